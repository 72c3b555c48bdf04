// pingpong: each math warpgroup computes whole tiles of 64 rows, every other one of the block's, and they take turns: while one is in
// its main loop the other is in its epilogue.
//
// The turn is given when a main loop ends, by the named barriers kBarrierTurn + group (256 threads): the warpgroup `group` waits on
// its barrier, and the other one arrives on it.  A warpgroup waits for its first stage only when it has the turn.  By then the other one
// has seen all stages of its own tile full, so no mbarrier full[stage] can be more than the one phase ahead that a parity can tell.
#pragma once
#include "roles/math.cuh"

namespace megamoe {

struct Pingpong {
    // rows of a tile; one warpgroup has the results of all of them in registers
    static constexpr u32 kBlockM = 64;
    static constexpr u32 kTileGroups = 1;     // warpgroups that compute a tile together
    static constexpr bool kExpands = false;   // expands weights in memory first (expand/ahead.cuh)
    static constexpr u32 kHelpers = 0;   // warpgroups behind the math warpgroups (expand/beside.cuh)

    /// What the math warpgroups run.
    template <class C> using Math = megamoe::Math<C>;

    /// Number of the warpgroup's first tile, among those of its thread block.
    MEGA_DEVICE static u32 first_tile(u32 group) { return group; }
    /// The first of its rows in a tile.
    MEGA_DEVICE static u32 first_row(u32) { return 0; }

    /// Before all tiles: warpgroup 1 gives the turn to warpgroup 0.
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
    /// At the stop tile: the warpgroup that has been given a turn for which there is no tile takes it too, so that no arrival is left on
    /// its barrier.
    MEGA_DEVICE static void finish(const TileView& stop, u32 group) {
        if (stop.owes_turn()) take_turn(group);
    }
};

}   // namespace megamoe
