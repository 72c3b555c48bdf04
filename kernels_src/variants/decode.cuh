// decode: operands swapped, for experts with few rows.  Weights are the rows of a product and tokens its columns, as few as
// there are; both math warpgroups take every tile.
#pragma once
#include "roles/swapped_math.cuh"

namespace megamoe {

struct Decode {
    static constexpr u32 kBlockM = 64;      // rows of a tile
    static constexpr u32 kTileGroups = 2;   // groups that compute a tile together

    /// What the math warpgroups run.
    template <class C> using Math = SwappedMath<C>;
};

}   // namespace megamoe
