// cooperative: both math warpgroups compute every tile, 64 of its 128 rows each, with the same weights.  There are no turns: the
// warpgroups read the stages they share at the same time.
#pragma once
#include "roles/math.cuh"

namespace megamoe {

struct Cooperative {
    // rows of a tile; each warpgroup has the results of half of them in registers
    static constexpr u32 kBlockM = 128;
    static constexpr u32 kTileGroups = 2;     // warpgroups that compute a tile together
    static constexpr bool kExpands = false;   // expands weights in memory first (expand/ahead.cuh)
    static constexpr u32 kHelpers = 0;   // warpgroups behind the math warpgroups (expand/beside.cuh)

    /// What the math warpgroups run.
    template <class C> using Math = megamoe::Math<C>;

    /// Number of the warpgroup's first tile, among those of its thread block.
    MEGA_DEVICE static u32 first_tile(u32) { return 0; }
    /// The first of its rows in a tile.
    MEGA_DEVICE static u32 first_row(u32 group) { return group * 64; }

    MEGA_DEVICE static void start(u32) {}
    MEGA_DEVICE static void take_turn(u32) {}
    MEGA_DEVICE static void give_turn(u32) {}
    MEGA_DEVICE static void finish(const TileView&, u32) {}
};

}   // namespace megamoe
