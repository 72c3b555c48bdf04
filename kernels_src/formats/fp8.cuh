// fp8: e4m3 codes, and a float scale for every 128 x 128 of them.  A policy that a kernel's `Config` names; of all formats this one says
// what each trait is for.
#pragma once
#include "mma/code_stream.cuh"
#include "mma/scales.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

struct Fp8 {
    static constexpr u32 kBits = 8;    // of a code, in memory and in the stages
    static constexpr u32 kGroup = 0;   // weights along K that share an exponent; 0: there are none
    static constexpr bool kEvenScales = false;               // see Unit in mma/swapped.cuh
    static constexpr ptx::Codes kCodes = ptx::Codes::e4m3;   // as the tensor cores take them

    /// How the weights lane brings a tile's codes, and their scales, into the stages.
    template <class C> using CodeStream = CodesAlone<C>;
    template <class C> using ScaleStream = WeightScaleStream<C>;

    /// 64 weight rows of a k-block as the left operand of a product, where operands are swapped (mma/swapped.cuh): WGMMA reads them from
    /// the stage, so all that there is to load is a descriptor.
    struct Rows {
        u64 descriptor;

        /// Addresses of codes and exponents in the stage; `m`: which 64 rows; place of the thread.
        MEGA_DEVICE void load(u32 weights, u32, u32 m, u32) {
            descriptor = ptx::matrix_descriptor(weights + m * (64 * kBlockK));
        }
        /// Of what was loaded apart (mma/swapped.cuh): there is nothing to expand.
        MEGA_DEVICE void expand(const Rows& loaded) { *this = loaded; }
        template <u32 kN> MEGA_DEVICE void multiply(ptx::Accumulator<kN / 2>& d, u64 tokens) const {
            d.multiply_weights(descriptor, tokens);
        }
    };
    using Packed = Rows;
};

}   // namespace megamoe
