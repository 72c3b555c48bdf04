// mxfp4: e2m1 codes, an exponent for every 32 of a row, and a float scale for every 128 x 128 (megamoe_jit/_layer/mxfp4.py).
//
// A code times the power of two that its exponent stands for is exact in e5m2, so weights become e5m2 on their way into the
// tensor cores, in registers.  A k-block of a tile has its codes and then its exponents:
//
//   codes       [64 rows][half of the depth][thread of a warpgroup][16 bytes]    what the thread makes 2 x 8 registers of
//   exponents   [64 rows][warp][lane / 4][row, row + 8][32 of the depth]         a byte each: 16 + what the code is times 2 to
#pragma once
#include "mma/code_stream.cuh"
#include "mma/magnitudes.cuh"
#include "mma/packed_rows.cuh"
#include "mma/scales.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

struct Mxfp4 {
    static constexpr u32 kBits = 4;             // of a weight's code, in memory and in the stages
    static constexpr u32 kGroup = 32;           // weights along K that share an exponent
    static constexpr bool kEvenScales = true;   // see Unit in mma/swapped.cuh

    template <class C> struct InStages {
        MEGA_DEVICE static u32 codes(const Shared<C>& s, u32 stage) { return s.weights(stage); }
        MEGA_DEVICE static u32 exponents(const Shared<C>& s, u32 stage) {
            return s.exponents(stage);
        }
    };
    template <class C>
    using CodeStream = CodesAndExponents<C, kBits, kGroup, Shared<C>::kWeightBytes, InStages<C>>;
    template <class C> using ScaleStream = WeightScaleStream<C>;

    /// What a thread holds of 64 rows of a k-block before it expands them.
    using Packed = PackedRows;

    /// 64 rows of a k-block as the left operand of a product: in registers, as e5m2.
    struct Rows {
        u32 a[4][4];   // 32 of the depth; see ptx::wgmma_weights_registers

        MEGA_DEVICE void load(u32 weights, u32 exponents, u32 m, u32 thread) {
            Packed packed;
            packed.load(weights, exponents, m, thread);
            expand(packed);
        }
        MEGA_DEVICE void expand(const Packed& packed) {
            ptx::expand_e2m1<Magnitudes>(a, packed.codes, packed.exponents);
        }
        template <u32 kN> MEGA_DEVICE void multiply(float (&d)[kN / 2], u64 tokens) const {
            ptx::wgmma_weights_registers<kN>(d, a, tokens);
        }
        /// Into registers that held another product.
        template <u32 kN> MEGA_DEVICE void multiply_again(float (&d)[kN / 2], u64 tokens) const {
            ptx::wgmma_weights_again<kN>(d, a, tokens);
        }
    };
};

}   // namespace megamoe
