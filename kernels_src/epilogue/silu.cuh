// SiLU, x / (1 + e^-x), in a fast and an exact form; and SwiGLU, which limits gate and up first.  Used by both epilogues of GEMM 1.
#pragma once
#include "ptx/convert.cuh"

namespace megamoe {

/// The exact form: within a last bit or two of a division.  `__fdiv_rn` would have a call of its slow path in each of 64 places,
/// which costs registers everywhere.  Up to -87, below which the reciprocal would not be a normal number, the result is a zero; that of
/// -inf is NaN, as in the fast form (ptx::swiglu_approx).
MEGA_DEVICE float silu(float x) {
    const float d = 1.0f + expf(-fmaxf(x, -87.0f)), r = ptx::reciprocal_approx(d);
    return x * (x > -87.0f ? __fmaf_rn(__fmaf_rn(-d, r, 1.0f), r, r) : 0.0f);
}

/// silu(min(gate, clamp)) * min(max(up, -clamp), clamp); NaN stays NaN.
template <class C> MEGA_DEVICE float swiglu(float gate, float up, float clamp) {
    if constexpr (C::kFastMath) return ptx::swiglu_approx(gate, up, clamp);
    else return silu(ptx::min_nan(gate, clamp)) * ptx::clamp_nan(up, clamp);
}

}   // namespace megamoe
