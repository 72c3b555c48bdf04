// The side of the L2 that a block is on; sched/order.cuh says what for.
//
// The host has measured which SM is next to which half, and it may be wrong.  If all blocks were on one side, the other
// side's tiles would never be done.  So every block counts itself, and unless both sides have blocks there is one order for
// all.
//
//   control[kControlSides]   added to by every block before the head's first barrier     read by every block after the second
//                            cleared by block 0 after the tail's barrier
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// 0 or 1; 0 where the host wants no sides.  Asked twice, at the head and by the weights warp: should a block ever be moved
/// to another SM in between, it is slower, not wrong.
MEGA_DEVICE u32 side_of_block(const Params& p) {
    const u32 sm = ptx::sm_id();
    return p.side_of_sm[min_u32(sm, 32 * kSideWords - 1) / 32] >> sm % 32 & p.want_sides;
}

constexpr u32 kOneOfSide1 = 1 << 16;   // the word's low half counts blocks of side 0, its high half those of side 1

MEGA_DEVICE void count_side(const Params& p) {
    if (p.want_sides) ptx::fetch_add_relaxed(p.control + kControlSides, side_of_block(p) ? kOneOfSide1 : 1);
}
/// 1 if both sides have blocks.
MEGA_DEVICE u32 both_sides(const Params& p) {
    const u32 counted = ptx::load_l2(p.control + kControlSides);
    return counted % kOneOfSide1 != 0 && counted / kOneOfSide1 != 0;
}

}  // namespace megamoe
