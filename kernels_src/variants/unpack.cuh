// unpack: as cooperative, for weights of four bits: the math warps unpack the next k-block's beside the products of this one.
#pragma once
#include "expand/beside.cuh"
#include "variants/cooperative.cuh"

namespace megamoe {

struct Unpack : Cooperative {
    static constexpr u32 kUnpacked = 3;   // k-blocks of unpacked weights in shared memory beside the stages

    template <class C> using Math = megamoe::Math<C, UnpackingLoop<C>>;
};

}   // namespace megamoe
