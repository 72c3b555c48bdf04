// Stand-in for ptx/convert.cuh.  Numbers are chosen so that they survive: FP8 codes are the integers 0 to 255, bf16 the
// integers 0 to 65535 (sim/model.h).
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

inline u32 to_integer(float x, u32 most) { return x >= 0 && x < 1e9f ? min_u32(static_cast<u32>(x + 0.5f), most) : most; }
inline u32 pack_e4m3(float lo, float hi) {
    return to_integer(lo * (255.0f / 448.0f), 255) | to_integer(hi * (255.0f / 448.0f), 255) << 8;
}
inline u32 pack_bf16(float lo, float hi) { return to_integer(lo, 65535) | to_integer(hi, 65535) << 16; }
inline float bf16_low(u32 pair) { return static_cast<float>(pair & 65535); }
inline float bf16_high(u32 pair) { return static_cast<float>(pair >> 16); }
inline float min_nan(float a, float b) { return a < b ? a : b; }
inline float max_nan(float a, float b) { return a > b ? a : b; }
/// With these silu(x) = x.
inline float exp2_approx(float) { return 0; }
inline float reciprocal_approx(float x) { return 1 / x; }

}  // namespace megamoe::ptx
