// Quantises rows by the rooms of the kernels, half a warp of 16 lanes after the other.  Standard input: bytes of a number, groups
// of 128, then the numbers.  Standard output: each group's scale, then its codes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/types.cuh"

static float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
static float __frcp_rn(float x) { return 1 / x; }
static float fmaxf_(float a, float b) { return std::fmax(a, b); }
template <class To, class From> static To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
static unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static float __uint_as_float(unsigned x) { return bits_as<float>(x); }
