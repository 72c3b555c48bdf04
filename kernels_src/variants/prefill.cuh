// prefill: like cooperative, for packed weights and many rows: weights are expanded to e5m2 in memory, each once per launch, and then
// multiplied like any FP8 weights (expand/ahead.cuh).
#pragma once
#include "variants/cooperative.cuh"

namespace megamoe {

struct Prefill : Cooperative {
    static constexpr bool kExpands = true;
};

}   // namespace megamoe
