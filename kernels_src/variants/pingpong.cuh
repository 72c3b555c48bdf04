// pingpong: each math warpgroup owns a whole tile of 64 rows, and the two are half a cycle out of phase: while one is in
// its main loop the other is in its epilogue.
//
// The turn passes when a main loop ends, by two hardware barriers (kBarrierTurn + group) on which one group waits and the
// other arrives.  A group looks at its first stage only when it has the turn: by then the other has seen all of its own,
// so no stage barrier can be a phase further than its parity can tell.
#pragma once
#include "roles/math.cuh"

namespace megamoe {

struct Pingpong {
    // rows of a tile: all of it is in the registers of one group
    static constexpr u32 kBlockM = 64;
    static constexpr u32 kTileGroups = 1;   // groups that compute a tile together
    static constexpr bool kExpands = false;   // weights in memory, before it reads them (expand/ahead.cuh)
    static constexpr u32 kPacked = 0;   // k-blocks of packed weights beside the stages (expand/beside.cuh)
    static constexpr u32 kHelpers = 0;   // warpgroups behind the math warpgroups

    /// What the math warpgroups run.
    template <class C> using Math = megamoe::Math<C>;

    /// The group's first tile, of those of its block of threads.
    MEGA_DEVICE static u32 first_tile(u32 group) { return group; }
    /// Where the group's rows of a tile begin.
    MEGA_DEVICE static u32 first_row(u32) { return 0; }

    /// Before all tiles: group 0 begins.
    MEGA_DEVICE static void start(u32 group) {
        if (group == 1) give_turn(group);
    }
    /// Before a main loop.
    MEGA_DEVICE static void take_turn(u32 group) {
        ptx::named_sync(kBarrierTurn + group, kMathGroups * kGroup);
    }
    /// After it.
    MEGA_DEVICE static void give_turn(u32 group) {
        ptx::named_arrive(kBarrierTurn + (group ^ 1), kMathGroups * kGroup);
    }
    /// At the stop tile: a turn for which there is no tile is taken too, which leaves the barrier as it was.
    MEGA_DEVICE static void finish(const TileView& stop, u32 group) {
        if (stop.owes_turn()) take_turn(group);
    }
};

}   // namespace megamoe
