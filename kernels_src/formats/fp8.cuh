// fp8: e4m3 codes, and a float scale for every 128 x 128 of them.
#pragma once
#include "mma/scales.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

struct Fp8 {
    static constexpr u32 kBits = 8;    // of a weight, in memory and in the stages
    static constexpr u32 kGroup = 0;   // weights along K that share an exponent; 0: there are none
    static constexpr ptx::Codes kCodes = ptx::Codes::e4m3;   // as the tensor cores take them

    /// How a tile's scales come into its stages.
    template <class C> using ScaleStream = WeightScaleStream<C>;
};

}   // namespace megamoe
