// unpack: like cooperative, for packed weights: a warpgroup of helpers unpacks the weights of the next k-blocks while the math
// warpgroups multiply (expand/beside.cuh).
#pragma once
#include "expand/beside.cuh"
#include "variants/cooperative.cuh"

namespace megamoe {

struct Unpack : Cooperative {
    static constexpr u32 kHelpers = 1;   // warpgroups of helpers behind the math warpgroups

    template <class C> using Math = megamoe::Math<C, NarrowLoop<C>>;
    template <class C> using Helper = Unpacker<C>;
};

}   // namespace megamoe
