// Prints, for the bits of each argument, the bits of its quantisation scale and of the reciprocal of that.  The first argument
// says to which side the approximation is a unit of the last place off, as the hardware's may be.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/types.cuh"
#include "intrinsics.h"

#define reciprocal_approx exact_reciprocal
#include "ptx/convert.cuh"
#undef reciprocal_approx
namespace megamoe::ptx {
float toward;
inline float reciprocal_approx(float x) { return std::nextafter(1 / x, toward); }
}  // namespace megamoe::ptx

#include "epilogue/quotient.cuh"

static unsigned bits(float x) {
    unsigned word;
    std::memcpy(&word, &x, 4);
    return word;
}

int main(int count, char** arguments) {
    megamoe::ptx::toward = std::strtof(arguments[1], nullptr);
    for (int i = 2; i < count; ++i) {
        const float largest = std::strtof(arguments[i], nullptr), scale = megamoe::quant_scale(largest);
        const float inverse = megamoe::reciprocal(scale);
        std::printf("%u %u %u %u\n", bits(scale), bits(largest / 448.0f), bits(inverse), bits(1.0f / scale));
    }
}
