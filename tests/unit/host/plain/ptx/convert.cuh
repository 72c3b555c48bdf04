// Stand-in for ptx/convert.cuh with the arithmetic of the hardware, for one lane at a time.
#pragma once
#include <cmath>

#include "../../intrinsics.h"
#include "base/types.cuh"

namespace megamoe::ptx {

inline float reciprocal_approx(float x) { return 1 / x; }
inline u32 choose_bytes(u32 low, u32 high, u32 select) { return __byte_perm(low, high, select); }
inline void expand_e2m1(u32 codes, u32 low, u32 high, u32& first, u32& second) {
    const u32 select = codes & 0x77777777u;
    first = choose_bytes(low, high, select) | (codes & 0x80808080u);
    second = choose_bytes(low, high, select >> 16) | (codes << 4 & 0x80808080u);
}
template <class Table> void expand_e2m1(Vec16& first, Vec16& second, const u32 (&codes)[4], u32 exponent) {
    const Table table(exponent);
    for (u32 i = 0; i < 4; ++i) expand_e2m1(codes[i], table.low, table.high, first.w[i], second.w[i]);
}
inline u32 max_u16x2(u32 a, u32 b) {
    const u32 low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a >> 16 > b >> 16 ? a : b;
    return (high & 0xFFFF0000) | (low & 0xFFFF);
}
inline float float_of_f16(u32 bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float finite = std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
    return std::copysign(exponent < 31 ? finite : fraction ? NAN : INFINITY, bits >> 15 ? -1.0f : 1.0f);
}
/// To the nearest, ties to even; the largest is 448.  A code counts steps of the last place from 0 on.
inline u32 e4m3(float x) {
    if (std::isnan(x)) return 0x7F;
    int exponent;
    const float size = std::fmin(std::fabs(x), 448.0f);
    std::frexp(size, &exponent);
    const int step = size < 0x1p-6f ? -9 : exponent - 4;
    return (std::signbit(x) ? 0x80 : 0) | (((step + 9) << 3) + static_cast<u32>(std::nearbyint(std::ldexp(size, -step))));
}
inline u32 pack_e4m3(float a, float b, float c, float d) { return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24; }

}  // namespace megamoe::ptx
