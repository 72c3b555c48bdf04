// What codes of four bits stand for, as e5m2.
#pragma once
#include "ptx/convert.cuh"

namespace megamoe {

/// The e5m2 bytes of the eight magnitudes times a power of two: 0, 0.5, 1, 1.5 and 2, 3, 4, 6.
struct Magnitudes {
    u32 low, high;

    /// `exponent`: 16 more than that of the power; 3 to 29.  A step of it is 4 in the byte of every magnitude but zero.
    MEGA_DEVICE explicit Magnitudes(u32 exponent)
        : low(exponent * 0x04040400u + (0x3E3C3800u - 16 * 0x04040400u)),
          high(exponent * 0x04040404u + (0x46444240u - 16 * 0x04040404u)) {}

    /// Eight codes to e5m2.  The magnitude of code i is in bits 4i to 4i + 2; the signs of the first four are in bits 8i + 7, of the
    /// others in bits 8(i - 4) + 3.
    MEGA_DEVICE void expand(u32 codes, u32& first, u32& second) const {
        const u32 select = codes & 0x77777777u;
        first = ptx::choose_bytes(low, high, select) | (codes & 0x80808080u);
        second = ptx::choose_bytes(low, high, select >> 16) | (codes << 4 & 0x80808080u);
    }
};

}   // namespace megamoe
