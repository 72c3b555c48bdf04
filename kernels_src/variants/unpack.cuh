// unpack: as cooperative, for weights of four bits: a warpgroup of helpers unpacks the next k-blocks' weights beside the products.
#pragma once
#include "expand/beside.cuh"
#include "variants/cooperative.cuh"

namespace megamoe {

struct Unpack : Cooperative {
    static constexpr u32 kPacked = 3;    // k-blocks of packed weights beside the stages
    static constexpr u32 kHelpers = 1;   // warpgroups behind the math warpgroups

    template <class C> using Math = megamoe::Math<C, NarrowLoop<C>>;
    template <class C> using Helper = Unpacker<C>;
};

}   // namespace megamoe
