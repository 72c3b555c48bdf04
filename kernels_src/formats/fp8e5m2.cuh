// fp8e5m2: as fp8, with e5m2 codes: what weights of four bits are expanded to.
#pragma once
#include "formats/fp8.cuh"

namespace megamoe {

struct Fp8E5M2 : Fp8 {
    struct Rows;   // none: products with operands swapped are of e4m3 codes, or of e5m2 in registers
};

}   // namespace megamoe
