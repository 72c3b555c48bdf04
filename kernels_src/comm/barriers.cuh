// Barriers over all blocks of the launch, and over all ranks.
//
// Grid barrier: one word.  Block 0 adds 2^31 - (blocks - 1), every other block adds 1, so each round flips the top bit
// and nothing is ever reset; the number of blocks may change from launch to launch.  The launch is cooperative, so all
// blocks are resident.
//
// Rank barrier: each rank adds 1 to every rank's signal word and waits for its own to reach ranks * epoch; the epoch
// lives in device memory, so graph replay advances it.  With one rank it compiles to nothing.
#pragma once
#include "comm/fault.cuh"

namespace megamoe {

/// Called by one thread of each block, after the block's own barrier; orders what the blocks wrote before it.
MEGA_DEVICE void grid_barrier(const Params& p, u32 which) {
    u32* word = p.control + kControlGridBarrier;
    const u32 step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    const u32 old = ptx::fetch_add_release(word, step);
    u32 now = old;
    wait_until(p, Wait::grid_barrier, which, gridDim.x, [&] { return ((now = ptx::load_acquire(word)) ^ old) >> 31 != 0; },
               [&] { return now & 0x7FFFFFFFu; });
}

/// Called by one thread of block 0 between two grid barriers.
template <u32 kRanks> MEGA_DEVICE void rank_barrier(const Params& p, u32 which) {
    if constexpr (kRanks > 1) {
        const u32 epoch = ++p.control[kControlEpoch];
        ptx::fence_system();
        for (u32 r = 0; r < kRanks; ++r) ptx::add_release_system(symmetric<u32>(p, r, p.signals), 1);
        const u32* own = symmetric<u32>(p, p.rank, p.signals);
        const u32 expected = epoch * kRanks;
        u32 now = 0;
        wait_until(p, Wait::peer_signal, which, expected,
                   [&] { return static_cast<i32>((now = ptx::load_acquire_system(own)) - expected) >= 0; }, [&] { return now; });
        ptx::fence_system();
    }
}

/// All threads of every block meet; with `across_ranks`, all ranks too.
template <u32 kRanks> MEGA_DEVICE void meet(const Params& p, u32 which, bool across_ranks) {
    __syncthreads();
    if (threadIdx.x == 0) {
        grid_barrier(p, which);
        if (kRanks > 1 && across_ranks) {
            if (blockIdx.x == 0) rank_barrier<kRanks>(p, which);
            grid_barrier(p, which);
        }
    }
    __syncthreads();
}

}  // namespace megamoe
