// Number formats: FP8 e4m3, bf16, and the NaN-propagating clamps.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

/// Two e4m3 codes, `lo` in the low byte; saturates to +-448, NaN stays NaN.
MEGA_DEVICE u32 pack_e4m3(float lo, float hi) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    return r;
}
MEGA_DEVICE u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
MEGA_DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
MEGA_DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

/// Unlike fminf and fmaxf these give NaN when either side is NaN: a broken row stays visibly broken.
MEGA_DEVICE float min_nan(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
MEGA_DEVICE float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
MEGA_DEVICE float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
MEGA_DEVICE float reciprocal_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

}  // namespace megamoe::ptx
