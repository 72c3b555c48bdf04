// x / (1 + e^-x), fast and exact; and SwiGLU, which limits gate and up first.
#pragma once
#include "ptx/convert.cuh"

namespace megamoe {

/// The exact form is as good as a division to a last bit or two.  `__fdiv_rn` would call a function for the ends of its range
/// in each of 64 places, which costs registers everywhere.  Below -87, where the reciprocal would be no normal number, the result is 0; that of -inf
/// is NaN, as of the fast form.
template <bool kFast> MEGA_DEVICE float silu(float x) {
    if constexpr (kFast) return x * ptx::sigmoid_approx(x);
    const float d = 1.0f + expf(-fmaxf(x, -87.0f)), r = ptx::reciprocal_approx(d);
    return x * (x > -87.0f ? __fmaf_rn(__fmaf_rn(-d, r, 1.0f), r, r) : 0.0f);
}

template <class C> MEGA_DEVICE float swiglu(float gate, float up, float clamp) {
    const float limited = ptx::clamp_nan(up, clamp);
    return silu<C::kFastMath>(ptx::min_nan(gate, clamp)) * limited;
}

}   // namespace megamoe
