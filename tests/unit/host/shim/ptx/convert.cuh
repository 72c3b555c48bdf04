// Stand-in for ptx/convert.cuh.  Numbers are chosen so that they survive: FP8 codes are the integers 0 to 255, bf16 the
// integers 0 to 65535 (sim/model.h).
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

inline u32 to_integer(float x, u32 most) { return x >= 0 && x < 1e9f ? min_u32(static_cast<u32>(x + 0.5f), most) : most; }
inline u32 to_code(float x) { return to_integer(x * (255.0f / 448.0f), 255); }
inline u32 pack_e4m3(float a, float b, float c, float d, float first, float second) {
    return to_code(a * first) | to_code(b * first) << 8 | to_code(c * second) << 16 | to_code(d * second) << 24;
}
inline u32 pack_e4m3(float a, float b, float c, float d) { return pack_e4m3(a, b, c, d, 1, 1); }
inline float float_of_f16(u32 bits) { return static_cast<float>(bits); }
inline u32 max_u16x2(u32 a, u32 b) {
    const u32 low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a >> 16 > b >> 16 ? a : b;
    return (high & 0xFFFF0000) | (low & 0xFFFF);
}
inline u32 pack_bf16(float lo, float hi) { return to_integer(lo, 65535) | to_integer(hi, 65535) << 16; }
inline void add_scaled_bf16(float (&sum)[8], float w, const Vec16& v) {
    for (u32 i = 0; i < 8; ++i) sum[i] += w * static_cast<float>(v.w[i / 2] >> i % 2 * 16 & 65535);
}
inline float min_nan(float x, float limit) { return x < limit ? x : limit; }
inline float clamp_nan(float x, float limit) { return x < -limit ? -limit : min_nan(x, limit); }
/// With silu(x) = x.
inline float swiglu_approx(float gate, float up, float limit) { return min_nan(gate, limit) * clamp_nan(up, limit); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline u32 choose_bytes(u32 low, u32 high, u32 select) {
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 which = select >> 4 * i & 7;
        result |= ((which < 4 ? low : high) >> which % 4 * 8 & 255) << 8 * i;
    }
    return result;
}
inline void expand_e2m1(u32 codes, u32 low, u32 high, u32& first, u32& second) {
    const u32 select = codes & 0x77777777;
    first = choose_bytes(low, high, select) | (codes & 0x80808080);
    second = choose_bytes(low, high, select >> 16) | (codes << 4 & 0x80808080);
}
template <class Table> void expand_e2m1(Vec16& first, Vec16& second, const u32 (&codes)[4], u32 exponent) {
    const Table table(exponent);
    for (u32 i = 0; i < 4; ++i) expand_e2m1(codes[i], table.low, table.high, first.w[i], second.w[i]);
}
template <class Table>
void expand_e2m1(u32 (&a)[4][4], const Vec16 (&codes)[2], const u32 (&exponents)[2]) {
    for (u32 k = 0; k < 4; ++k)
        for (u32 row = 0; row < 2; ++row) {
            const Table table(exponents[row] >> 8 * k & 255);
            expand_e2m1(codes[k / 2].w[k % 2 * 2 + row], table.low, table.high, a[k][row], a[k][row + 2]);
        }
}

}  // namespace megamoe::ptx
