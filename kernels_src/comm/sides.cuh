// The side of the L2 that a block is on; sched/order.cuh says what for.
//
// The host has measured which SM is next to which half.  Should all blocks run on one side for all that, the tiles of the
// other would never be done: so each block counts itself at the head, and without blocks on both sides there are none.
//
//   control[kControlSides]   counted up by every block before the head's first barrier   read by every block after it
//                            cleared by block 0 after the tail's barrier
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// 0 or 1; 0 where the host knows no sides.
MEGA_DEVICE u32 side_of_block(const Params& p) {
    const u32 sm = ptx::sm_id();
    return p.side_of_sm[min_u32(sm, 159) / 32] >> sm % 32 & p.two_sides;
}

constexpr u32 kOneOfSide1 = 1 << 16;   // in the word that counts the blocks of both; 1 is one of side 0

MEGA_DEVICE void count_side(const Params& p) {
    if (p.two_sides) ptx::fetch_add_relaxed(p.control + kControlSides, side_of_block(p) ? kOneOfSide1 : 1);
}
/// 1 if both sides have blocks.
MEGA_DEVICE u32 both_sides(const Params& p) {
    const u32 counted = ptx::load_l2(p.control + kControlSides);
    return counted % kOneOfSide1 != 0 && counted / kOneOfSide1 != 0;
}

}  // namespace megamoe
