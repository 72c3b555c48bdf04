// What main loops have in common: they read one stage after the other, and hand each back.
#pragma once
#include "comm/fault.cuh"
#include "layout/shared.cuh"
#include "pipe/ring.cuh"
#include "ptx/control.cuh"

namespace megamoe {

/// A stage whose products are done may be loaded again.
template <class C> MEGA_DEVICE void release_stage(const Shared<C>& shared, u32 stage, u32 thread) {
    __syncwarp();   // all lanes have read what they read of it, and none still looks at this phase
    if (thread % kWarp == 0) ptx::mbarrier_arrive(shared.empty(stage));
}

/// Where a warpgroup is that multiplies activations, by rows, with weights.
template <class C> struct StageReader {
    const Shared<C>& shared;
    Ring<C::kStages> ring;
    u32 row;      // first row of the activation tile that this warpgroup multiplies
    u32 thread;   // read once: the special register is slow

    MEGA_DEVICE StageReader(const Shared<C>& shared_, u32 k_begin, u32 row_)
        : shared(shared_), ring(k_begin), row(row_), thread(ptx::thread_id_again()) {}

    MEGA_DEVICE void release(u32 stage) const { release_stage(shared, stage, thread); }

    /// Hands the stages back unread: this warpgroup's rows are all padding.
    MEGA_DEVICE void skip(u32 k_blocks) {
        for (; k_blocks > 0; --k_blocks) {
            wait_barrier_watched(shared.full(ring.stage), ring.parity);
            release(ring.stage);
            ring.advance();
        }
    }
};

}   // namespace megamoe
