// Barriers over all blocks of the launch, and over all ranks.
//
// Grid barrier: one word.  Block 0 adds 2^31 - (blocks - 1), every other block adds 1, so each round flips the top bit
// and nothing is ever reset; the number of blocks may change from launch to launch.  The launch is cooperative, so all
// blocks are resident.
//
// Rank barrier: in each rank's symmetric memory there is one word per meeting and source rank.  A rank that has reached a
// meeting stores the launch's epoch into its word at every rank, and waits until its own words have all reached it.  So the
// words only grow, a wait can say which ranks are missing, and nothing has to be reset.  The epoch lives in device memory:
// graph replay advances it.  With one rank all of this compiles to nothing.
#pragma once
#include "comm/fault.cuh"

namespace megamoe {

/// Called by one thread of each block, after the block's own barrier; orders what the blocks wrote before it.  `which` is
/// for the report: the launch's first, second or third.
MEGA_DEVICE void grid_barrier(const Params& p, Wait what, u32 which) {
    u32* word = p.control + kControlGridBarrier;
    const u32 step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    const u32 old = ptx::fetch_add_release(word, step);
    wait_until(
        p, what, which, gridDim.x, [&] { return (ptx::load_acquire(word) ^ old) >> 31 != 0; },
        [&] { return ptx::load_acquire(word) & 0x7FFFFFFFu; });
}

/// Where all ranks meet in a launch.
enum class Meeting : u32 {
    inputs = 0,    // every rank's inputs and sorted pairs may be read
    results = 1,   // every rank has scattered its rows
};

/// Called by one thread of block 0, after a grid barrier: this rank has reached the meeting.
template <u32 kRanks> MEGA_DEVICE void rank_arrive(const Params& p, Meeting meeting, u32 epoch) {
    ptx::fence_system();
    for (u32 r = 0; r < kRanks; ++r)
        ptx::store_release_system(
            symmetric<u32>(p, r, p.signals) + static_cast<u32>(meeting) * kMaxRanks + p.rank, epoch);
}

/// Called by one thread of each block: all ranks have reached the meeting.
template <u32 kRanks> MEGA_DEVICE void rank_wait(const Params& p, Meeting meeting, u32 epoch) {
    const u32* words = symmetric<const u32>(p, p.rank, p.signals) +
                       static_cast<u32>(meeting) * kMaxRanks;
    const auto missing = [&] {
        u32 mask = 0;
        for (u32 r = 0; r < kRanks; ++r)
            mask |= static_cast<u32>(static_cast<i32>(ptx::load_acquire_system(words + r) - epoch) < 0)
                    << r;
        return mask;
    };
    wait_until(
        p, Wait::peer_signal, static_cast<u32>(meeting), epoch, [&] { return missing() == 0; },
        missing);
}

/// One thread of every block: all blocks of all ranks (of this one, if there is no other) have reached the meeting.
template <u32 kRanks> MEGA_DEVICE void meet(const Params& p, Meeting meeting, u32 epoch) {
    if constexpr (kRanks > 1) ptx::fence_system();   // what this block wrote for other ranks
    grid_barrier(p, meeting == Meeting::inputs ? Wait::head_barrier : Wait::tail_barrier,
                 1 + static_cast<u32>(meeting));
    if constexpr (kRanks > 1) {
        if (blockIdx.x == 0) rank_arrive<kRanks>(p, meeting, epoch);
        rank_wait<kRanks>(p, meeting, epoch);
    }
}

}   // namespace megamoe
