// What the main loops have in common: they read one stage after the other and release each.
#pragma once
#include "comm/fault.cuh"
#include "layout/shared.cuh"
#include "pipe/arrivals.cuh"
#include "pipe/ring.cuh"
#include "ptx/control.cuh"

namespace megamoe {

/// Called by all lanes of a math warp when its last read of the stage is over and its WGMMAs of it have been waited for: the stage may
/// be loaded again once all its readers have said so.
template <class C> MEGA_DEVICE void release_stage(const Shared<C>& shared, u32 stage, u32 thread) {
    __syncwarp();   // all lanes have read their part, and none still tests this phase of full[stage]
    if (arrives(thread)) ptx::mbarrier_arrive(shared.empty(stage));
}

/// A warpgroup's position in the stages, where activations are the rows of a product (mma/block_scaled.cuh, expand/beside.cuh).
template <class C> struct StageReader {
    const Shared<C>& shared;
    Ring<C::kStages> ring;
    u32 row;      // first row of the activation tile that this warpgroup multiplies
    u32 thread;   // read once: the special register is slow

    MEGA_DEVICE StageReader(const Shared<C>& shared_, u32 k_begin, u32 row_)
        : shared(shared_), ring(k_begin), row(row_), thread(ptx::thread_id_again()) {}

    MEGA_DEVICE void release(u32 stage) const { release_stage(shared, stage, thread); }

    /// Releases a tile's stages unread: this warpgroup's rows of it are all padding.
    MEGA_DEVICE void skip(u32 k_blocks) {
        for (; k_blocks > 0; --k_blocks) {
            wait_barrier_watched(shared.full(ring.stage), ring.parity);
            release(ring.stage);
            ring.advance();
        }
    }
};

}   // namespace megamoe
