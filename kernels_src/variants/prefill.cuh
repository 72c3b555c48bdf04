// prefill: as cooperative, for weights of four bits and many rows: they are expanded in memory, each once in a launch, and then
// multiplied as if they had always been so.
#pragma once
#include "variants/cooperative.cuh"

namespace megamoe {

struct Prefill : Cooperative {
    static constexpr bool kExpands = true;
};

}   // namespace megamoe
