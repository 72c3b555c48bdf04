// fp8e5m2: like fp8, with e5m2 codes.  This is what the stages of unpack and prefill hold: packed weights, expanded.
#pragma once
#include "formats/fp8.cuh"

namespace megamoe {

struct Fp8E5M2 : Fp8 {
    static constexpr ptx::Codes kCodes = ptx::Codes::e5m2;
    // not defined: with operands swapped, weights are e4m3 in shared memory or e5m2 in registers
    struct Rows;
    using Packed = Rows;
};

}   // namespace megamoe
