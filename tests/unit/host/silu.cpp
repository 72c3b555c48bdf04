// Prints the exact silu of each argument; the reciprocal is a unit of the last place off, as the hardware's may be.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "base/types.cuh"
#include "intrinsics.h"

#define reciprocal_approx exact_reciprocal
#include "ptx/convert.cuh"
#undef reciprocal_approx
namespace megamoe::ptx {
inline float reciprocal_approx(float x) { return std::nextafter(1 / x, 0.0f); }
}  // namespace megamoe::ptx

#include "epilogue/silu.cuh"

int main(int count, char** arguments) {
    for (int i = 1; i < count; ++i) std::printf("%.9g\n", megamoe::silu(std::strtof(arguments[i], nullptr)));
}
