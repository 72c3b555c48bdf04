// Barriers over all blocks of the launch, and over all ranks.  Called by the head (kernels/megamoe.cuh) and, before combine, by
// the publisher warp (roles/combine.cuh).
//
// Grid barrier: one word, Params::control[kControlGridBarrier].  Block 0 adds 2^31 - (blocks - 1), every other block adds 1: the
// sum is 2^31, so each round flips the top bit, only the last addition of a round does, and nothing is ever reset.  The number
// of blocks may change from launch to launch.  The launch is cooperative, so all blocks are resident.
//
// Rank barrier: each rank's symmetric memory has one word per meeting and source rank, Params::signals.
//   1. Every block adds to its rank's grid barrier word with `acq_rel.sys`.  The last one has thereby acquired what all blocks
//      of the rank wrote, to peers' memory too.
//   2. That block stores the launch's epoch into the word of its own rank in every rank's memory, `release.sys`, lane r at rank r.
//   3. Every block waits until all words in its own rank's memory have reached the epoch, `acquire.sys`, lane r for rank r.
// So a meeting costs one system-scope atomic per block and one round of stores and loads, however many ranks there are.  The words
// only grow, so nothing has to be reset, and a wait can say which ranks are missing.  The epoch is counted in device memory, so
// replays of a CUDA graph advance it too.  With one rank only the grid barrier is left.
#pragma once
#include "comm/fault.cuh"

namespace megamoe {

/// What a block adds to the word of the grid barrier.
MEGA_DEVICE u32 grid_step(u32 block, u32 blocks) {
    return block == 0 ? 0x80000000u - (blocks - 1) : 1;
}

/// Waits until all blocks have added to the word, of which `old` is the value before this block did.
MEGA_DEVICE void grid_wait(const Params& p, Wait what, u32 which, const u32* word, u32 old) {
    wait_until(
        p, what, which, gridDim.x, [&] { return (ptx::load_acquire(word) ^ old) >> 31 != 0; },
        [&] { return ptx::load_acquire(word) & 0x7FFFFFFFu; });
}

/// Called by one thread of each block between two barriers of the block: what any block wrote before it is visible to all blocks
/// after it (`release.gpu`, `acquire.gpu`).  `which` is for the report: 0, 1 or 2, in the order of the launch.
MEGA_DEVICE void grid_barrier(const Params& p, Wait what, u32 which) {
    u32* word = p.control + kControlGridBarrier;
    grid_wait(p, what, which, word, ptx::fetch_add_release(word, grid_step(blockIdx.x, gridDim.x)));
}

/// Where all ranks meet in a launch.
enum class Meeting : u32 {
    inputs = 0,    // every rank's inputs and sorted pairs may be read
    results = 1,   // every rank has scattered its rows
};

/// Step 2, by a warp of the block that comes last.
template <u32 kRanks> MEGA_DEVICE void rank_arrive(const Params& p, Meeting meeting, u32 epoch) {
    const u32 r = ptx::lane_id();
    if (r < kRanks)
        ptx::store_release_system(
            symmetric<u32>(p, r, p.signals) + static_cast<u32>(meeting) * kMaxRanks + p.rank, epoch);
}

/// Step 3, by a warp of each block.  Epochs are compared by their signed difference, so they may wrap.
template <u32 kRanks> MEGA_DEVICE void rank_wait(const Params& p, Meeting meeting, u32 epoch) {
    const u32* words = symmetric<const u32>(p, p.rank, p.signals) +
                       static_cast<u32>(meeting) * kMaxRanks;
    const auto reached = [&](u32 r) {
        return static_cast<i32>(ptx::load_acquire_system(words + r) - epoch) >= 0;
    };
    const u32 r = ptx::lane_id();
    if (r < kRanks)
        wait_until(
            p, Wait::peer_signal, static_cast<u32>(meeting), epoch, [&] { return reached(r); },
            [&] {
                u32 missing = 0;
#pragma unroll 1
                for (u32 other = 0; other < kRanks; ++other)
                    missing |= static_cast<u32>(!reached(other)) << other;
                return missing;
            });
    __syncwarp();
}

// threads of each block that call `meet`: one, or a warp if there are other ranks
template <u32 kRanks> constexpr u32 kMeetingThreads = kRanks == 1 ? 1 : kWarp;

/// Called by kMeetingThreads of one warp of every block, between two barriers of the block: when it returns, all blocks of all
/// ranks (or of the only one) have reached the meeting, and what they wrote before is visible.
template <u32 kRanks> MEGA_DEVICE void meet(const Params& p, Meeting meeting, u32 epoch) {
    const Wait what = meeting == Meeting::inputs ? Wait::head_barrier : Wait::tail_barrier;
    const u32 which = 1 + static_cast<u32>(meeting);
    if constexpr (kRanks == 1) {
        grid_barrier(p, what, which);
    } else {
        u32* arrived = p.control + kControlGridBarrier;
        const u32 step = grid_step(blockIdx.x, gridDim.x);
        u32 old = 0;
        // releases what this block wrote, at system scope; the last block acquires it from all
        if (ptx::lane_id() == 0) old = ptx::fetch_add_acq_rel_system(arrived, step);
        old = __shfl_sync(~0u, old, 0);
        __syncwarp();   // orders lane 0's acquire before the other lanes' releases; a shuffle orders no memory
        if (((old + step) ^ old) >> 31) rank_arrive<kRanks>(p, meeting, epoch);
        else if (ptx::lane_id() == 0) grid_wait(p, what, which, arrived, old);
        __syncwarp();
        rank_wait<kRanks>(p, meeting, epoch);
    }
}

}   // namespace megamoe
