// mxfp4: e2m1 codes, an exponent for 32 of them along K, and a power of two, as a float, for every 128 x 128.
#pragma once
#include "mma/scales.cuh"

namespace megamoe {

struct Mxfp4 {
    static constexpr u32 kBits = 4;     // of a weight, in memory and in the stages
    static constexpr u32 kGroup = 32;   // weights along K that share an exponent

    /// How a tile's scales come into its stages.
    template <class C> using ScaleStream = WeightScaleStream<C>;
};

}   // namespace megamoe
