// The side of the L2 that a block is on; sched/order.cuh says what for.  Called by the head.
//
// The host has measured which SM is next to which half of the L2.  It may be wrong, or not know the SMs of this launch.  If all
// blocks were on one side, the other side's tiles would never be computed; if most were, the few others would have to compute half
// of all tiles.  So every block counts itself, and unless each side has at least a quarter of the blocks all take one order.
// A block reads its SM once: the side that it has counted itself on is the side whose tiles it takes.
//
//   control[kControlSides]   added to by every block before grid barrier 0, read by every block after grid barrier 1,
//                            cleared by block 0 after grid barrier 2, for the next launch
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

// the word's low half counts blocks of side 0, its high half those of side 1
constexpr u32 kOneOfSide1 = 1 << 16;

/// Counts this block and returns its side, 0 or 1; counts nothing and returns 0 where the host wants no sides.
MEGA_DEVICE u32 count_side(const Params& p) {
    const u32 sm = ptx::sm_id(),
              side = p.side_of_sm[min_u32(sm, 32 * kSideWords - 1) / 32] >> sm % 32 & p.want_sides;
    if (p.want_sides) ptx::fetch_add_relaxed(p.control + kControlSides, side ? kOneOfSide1 : 1);
    return side;
}
/// Blocks on each side.
struct SideCounts {
    u32 of0, of1;
};
MEGA_DEVICE SideCounts counted_sides(const Params& p) {
    const u32 counted = ptx::load_l2(p.control + kControlSides);
    return {counted % kOneOfSide1, counted / kOneOfSide1};
}

}   // namespace megamoe
