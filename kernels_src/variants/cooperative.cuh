// cooperative: both math warpgroups take every tile; each multiplies 64 of its 128 rows with the same weights.  Nobody
// waits for a turn: what they share is read at the same time.
#pragma once
#include "roles/math.cuh"

namespace megamoe {

struct Cooperative {
    // rows of a tile, half of them in the registers of each group
    static constexpr u32 kBlockM = 128;
    static constexpr u32 kTileGroups = 2;   // groups that compute a tile together
    static constexpr bool kExpands = false;   // weights in memory, before it reads them (expand/ahead.cuh)
    static constexpr u32 kPacked = 0;   // k-blocks of packed weights beside the stages (expand/beside.cuh)
    static constexpr u32 kHelpers = 0;   // warpgroups behind the math warpgroups

    /// What the math warpgroups run.
    template <class C> using Math = megamoe::Math<C>;

    /// The group's first tile, of those of its block of threads.
    MEGA_DEVICE static u32 first_tile(u32) { return 0; }
    /// Where the group's rows of a tile begin.
    MEGA_DEVICE static u32 first_row(u32 group) { return group * 64; }

    MEGA_DEVICE static void start(u32) {}
    MEGA_DEVICE static void take_turn(u32) {}
    MEGA_DEVICE static void give_turn(u32) {}
    MEGA_DEVICE static void finish(const TileView&, u32) {}
};

}   // namespace megamoe
