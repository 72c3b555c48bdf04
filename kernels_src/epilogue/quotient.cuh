// Divisions of the requantisation (epilogue/) and of staging (stage/quantise.cuh) without `__fdiv_rn`, which would bring a slow path
// for very large and very small numbers, a function, into the math warps.  Numbers here are not of that kind: a largest magnitude is
// kLeastMagnitude or more, and the reciprocal of its scale a normal number.  Infinity gives NaN; a row that has it is NaN either way.
#pragma once
#include "ptx/convert.cuh"

namespace megamoe {

// what counts as the largest magnitude of a quantisation block that has only smaller ones
constexpr float kLeastMagnitude = 1e-10f;

/// The scale of a quantisation block: its largest magnitude / 448, correctly rounded.
MEGA_DEVICE float quant_scale(float largest) {
    constexpr float kInverse = 1.0f / 448.0f;
    const float near = largest * kInverse;
    return __fmaf_rn(__fmaf_rn(-448.0f, near, largest), kInverse, near);
}

/// 1 / x to a last bit or so: two Newton steps from the hardware's approximation, as in the compiler's own division.
MEGA_DEVICE float reciprocal(float x) {
    const float first = ptx::reciprocal_approx(x),
                second = __fmaf_rn(first, __fmaf_rn(-x, first, 1.0f), first);
    return __fmaf_rn(second, __fmaf_rn(-x, second, 1.0f), second);
}

/// 1 / x, correctly rounded where x and the result are normal numbers: what the compiler makes of `__frcp_rn`, without its slow path for
/// others.
MEGA_DEVICE float reciprocal_rn(float x) {
    const float near = ptx::reciprocal_approx(x);
    return __fmaf_rn(near, -__fmaf_rn(near, x, -1.0f), near);
}

}   // namespace megamoe
