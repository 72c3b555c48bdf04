// Quantises groups of 128 numbers by the code of the kernels, one lane after the other.  Argument: the format.  Standard input:
// the numbers.  Standard output: for each group its scale and its codes.
#include <cstdio>
#include <string>

#include "base/types.cuh"
#include "intrinsics.h"

template <class T> static T __shfl_xor_sync(unsigned, T value, unsigned) { return value; }

#include "stage/quantise.cuh"

using namespace megamoe;

template <class T> static void run() {
    constexpr unsigned kGroup = kQuantBlock * T::kBytes;
    u8 numbers[kGroup];
    while (std::fread(numbers, 1, kGroup, stdin) == kGroup) {
        Eight<T> lanes[16];
        float largest = 0;
        for (unsigned lane = 0; lane < 16; ++lane) {
            lanes[lane].load(numbers + lane * 8 * T::kBytes, lane % 2 == 0);
            Eight<T> alone[1] = {lanes[lane]};
            float of_lane[1];
            largest_of_groups(alone, of_lane);
            if (__float_as_uint(of_lane[0]) > __float_as_uint(largest)) largest = of_lane[0];
        }
        const Divisor by(largest);
        u8 codes[kQuantBlock];
        for (unsigned i = 0; i < kQuantBlock; ++i)
            codes[i] = ptx::pack_e4m3(by(lanes[i / 8][i % 8]), 0, 0, 0) & 0xFF;
        std::fwrite(&by.scale, 4, 1, stdout);
        std::fwrite(codes, 1, sizeof codes, stdout);
    }
}

int main(int, char** arguments) {
    const std::string format = arguments[1];
    format == "bf16" ? run<Bf16>() : format == "f16" ? run<F16>() : run<F32>();
}
