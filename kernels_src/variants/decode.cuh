// decode: operands swapped, for experts with few rows.  Weights are the rows of a product and tokens its columns, as few as
// there are; both math warpgroups take every tile.
#pragma once
#include "roles/swapped_math.cuh"

namespace megamoe {

struct Decode {
    static constexpr u32 kBlockM = 64;      // rows of a tile
    static constexpr u32 kTileGroups = 2;   // groups that compute a tile together
    static constexpr bool kExpands = false;   // weights in memory, before it reads them (expand/ahead.cuh)
    static constexpr u32 kHelpers = 0;   // warpgroups behind the math warpgroups (expand/beside.cuh)

    /// Columns of the main loop that comes after that of so many, or after none: 8, 16, 32, 64.
    MEGA_DEVICE static constexpr u32 wider(u32 columns) { return columns == 0 ? 8 : columns * 2; }
    // up to so many, both blocks of a k-block are loaded at once (mma/swapped.cuh)
    static constexpr u32 kColumnsAtOnce = 32;

    /// What the math warpgroups run.
    template <class C> using Math = SwappedMath<C>;
};

}   // namespace megamoe
