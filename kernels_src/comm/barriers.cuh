// Barriers over all blocks of the launch, and over all ranks.
//
// Grid barrier: one word.  Block 0 adds 2^31 - (blocks - 1), every other block adds 1, so each round flips the top bit
// and nothing is ever reset; the number of blocks may change from launch to launch.  The launch is cooperative, so all
// blocks are resident.
//
// Rank barrier: in each rank's symmetric memory there is one word per meeting and source rank.  The block of a rank that
// comes last to a grid barrier stores the launch's epoch into the rank's word at every rank, each lane of a warp into
// another's; every block waits until its rank's own words have all reached it, each lane for another.  So a meeting takes
// one fence of each block and one more of the last, and one round of stores and of loads, however many ranks there are.
// The words only grow, a wait can say which ranks are missing, and nothing has to be reset.  The epoch lives in device
// memory: graph replay advances it.  With one rank all of this compiles to nothing.
#pragma once
#include "comm/fault.cuh"

namespace megamoe {

/// What a block adds to the word.
MEGA_DEVICE u32 grid_step(u32 block, u32 blocks) {
    return block == 0 ? 0x80000000u - (blocks - 1) : 1;
}

/// Until all blocks have added to the word, given what it was before this one did.
MEGA_DEVICE void grid_wait(const Params& p, Wait what, u32 which, const u32* word, u32 old) {
    wait_until(
        p, what, which, gridDim.x, [&] { return (ptx::load_acquire(word) ^ old) >> 31 != 0; },
        [&] { return ptx::load_acquire(word) & 0x7FFFFFFFu; });
}

/// Called by one thread of each block, after the block's own barrier; orders what the blocks wrote before it.  `which` is
/// for the report: the launch's first, second or third.
MEGA_DEVICE void grid_barrier(const Params& p, Wait what, u32 which) {
    u32* word = p.control + kControlGridBarrier;
    grid_wait(p, what, which, word, ptx::fetch_add_release(word, grid_step(blockIdx.x, gridDim.x)));
}

/// Where all ranks meet in a launch.
enum class Meeting : u32 {
    inputs = 0,    // every rank's inputs and sorted pairs may be read
    results = 1,   // every rank has scattered its rows
};

/// Called by a warp of the block that comes last: this rank has reached the meeting.
template <u32 kRanks> MEGA_DEVICE void rank_arrive(const Params& p, Meeting meeting, u32 epoch) {
    const u32 r = ptx::lane_id();
    if (r < kRanks)
        ptx::store_release_system(
            symmetric<u32>(p, r, p.signals) + static_cast<u32>(meeting) * kMaxRanks + p.rank, epoch);
}

/// Called by a warp of each block: all ranks have reached the meeting.
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
                for (u32 other = 0; other < kRanks; ++other)
                    missing |= static_cast<u32>(!reached(other)) << other;
                return missing;
            });
    __syncwarp();
}

// threads of each block that call `meet`: a warp if there are other ranks
template <u32 kRanks> constexpr u32 kMeetingThreads = kRanks == 1 ? 1 : kWarp;

/// The first kMeetingThreads of every block, or a whole warp of it: all blocks of all ranks (of this one, if there is no
/// other) have reached the meeting.
template <u32 kRanks> MEGA_DEVICE void meet(const Params& p, Meeting meeting, u32 epoch) {
    const Wait what = meeting == Meeting::inputs ? Wait::head_barrier : Wait::tail_barrier;
    const u32 which = 1 + static_cast<u32>(meeting);
    if constexpr (kRanks == 1) {
        grid_barrier(p, what, which);
    } else {
        u32* arrived = p.control + kControlGridBarrier;
        const u32 step = grid_step(blockIdx.x, gridDim.x);
        u32 old = 0;
        // releases what this block wrote, for other ranks too; who comes last acquires it of all
        if (ptx::lane_id() == 0) old = ptx::fetch_add_acq_rel_system(arrived, step);
        old = __shfl_sync(~0u, old, 0);
        __syncwarp();   // as a shuffle orders no memory
        if (((old + step) ^ old) >> 31) rank_arrive<kRanks>(p, meeting, epoch);
        else if (ptx::lane_id() == 0) grid_wait(p, what, which, arrived, old);
        __syncwarp();
        rank_wait<kRanks>(p, meeting, epoch);
    }
}

}   // namespace megamoe
