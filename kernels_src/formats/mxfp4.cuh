// mxfp4: e2m1 codes, an exponent for every 32 of a row, and a float scale for every 128 x 128 (megamoe_jit/_layer/mxfp4.py).
//
// A code times the power of two of its group is exact in e5m2, so weights become e5m2 on their way into the tensor cores; here, for
// decode and wide, in registers.  In a stage a k-block has its codes and, apart, its exponents, in the order in which threads need them:
//
//   codes       [which 64 rows][half of the depth][place of a thread][16 bytes]      of which a thread makes 8 registers per half
//   exponents   [which 64 rows][warp][lane / 4][row t/4, row t/4 + 8][which 32 of the depth]     a byte each: the power's exponent + 16
//
// A thread's place is its number with lane / 8 in the way of its lowest bits (packed_place, mma/packed_rows.cuh), for the sake of banks.
// Of its sixteen bytes each four are eight codes of a row and 32 columns: of row t/4, of t/4 + 8, and the same of the next 32.
#pragma once
#include "mma/code_stream.cuh"
#include "mma/magnitudes.cuh"
#include "mma/packed_rows.cuh"
#include "mma/scales.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

struct Mxfp4 {
    static constexpr u32 kBits = kPackedBits, kGroup = kPackedGroup;
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

    /// 64 weight rows of a k-block as the left operand of a product: expanded to e5m2 in registers.
    struct Rows {
        u32 a[4][4];   // four words for each 32 of the depth; see ptx::Accumulator::multiply

        MEGA_DEVICE void load(u32 weights, u32 exponents, u32 m, u32 place) {
            Packed packed;
            packed.load(weights, exponents, m, place);
            expand(packed);
        }
        MEGA_DEVICE void expand(const Packed& packed) {
            ptx::expand_e2m1<Magnitudes>(a, packed.codes, packed.exponents);
        }
        template <u32 kN> MEGA_DEVICE void multiply(ptx::Accumulator<kN / 2>& d, u64 tokens) const {
            d.multiply_weights(a, tokens);
        }
    };
};

}   // namespace megamoe
