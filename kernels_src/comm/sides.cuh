// The side of the L2 that a block is on; sched/order.cuh says what for.
//
// The host has measured which SM is next to which half, and it may be wrong, or not know the SMs of this launch.  If all
// blocks were on one side, the other side's tiles would never be done, and if most were, the others would have to do half
// of the tiles.  So every block counts itself, and unless each side has a quarter of the blocks there is one order for all.
// A block asks where it is once: what it has counted as is the side whose tiles it takes.
//
//   control[kControlSides]   added to by every block before the head's first barrier     read by every block after the second
//                            cleared by block 0 after the tail's barrier
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

// the word's low half counts blocks of side 0, its high half those of side 1
constexpr u32 kOneOfSide1 = 1 << 16;

/// Counts this block, and returns its side, 0 or 1; 0 where the host wants no sides.
MEGA_DEVICE u32 count_side(const Params& p) {
    const u32 sm = ptx::sm_id(),
              side = p.side_of_sm[min_u32(sm, 32 * kSideWords - 1) / 32] >> sm % 32 & p.want_sides;
    if (p.want_sides) ptx::fetch_add_relaxed(p.control + kControlSides, side ? kOneOfSide1 : 1);
    return side;
}
/// Blocks of either side.
struct SideCounts {
    u32 of0, of1;
};
MEGA_DEVICE SideCounts counted_sides(const Params& p) {
    const u32 counted = ptx::load_l2(p.control + kControlSides);
    return {counted % kOneOfSide1, counted / kOneOfSide1};
}

}   // namespace megamoe
