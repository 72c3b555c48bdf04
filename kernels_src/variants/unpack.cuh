// unpack: as cooperative, for weights of four bits: a warpgroup of helpers unpacks the next k-blocks' weights beside the products.
#pragma once
#include "expand/beside.cuh"
#include "variants/cooperative.cuh"

namespace megamoe {

struct Unpack : Cooperative {
    static constexpr bool kPacked = true;   // packed weights beside the stages, as many k-blocks
    static constexpr u32 kHelpers = 1;      // warpgroups behind the math warpgroups

    template <class C> using Math = megamoe::Math<C, NarrowLoop<C>>;
    template <class C> using Helper = Unpacker<C>;
};

}   // namespace megamoe
