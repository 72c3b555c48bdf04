// The values of four-bit codes as e5m2 bytes.  Used where packed weights are expanded: in registers (formats/mxfp4.cuh) or into shared
// memory (expand/unpack.cuh).
#pragma once
#include "base/types.cuh"

namespace megamoe {

/// A table of eight bytes: the e2m1 magnitudes 0, 0.5, 1, 1.5 (`low`) and 2, 3, 4, 6 (`high`) times a power of two, as e5m2.
struct Magnitudes {
    static constexpr u32 kLowStep = 0x04040400, kHighStep = 0x04040404,
                         kLow = 0x3E3C3800 - 16 * kLowStep, kHigh = 0x46444240 - 16 * kHighStep;
    u32 low, high;

    /// `exponent`: that of the power, plus 16.  One more adds 4 to the byte of every magnitude but zero, whose byte stays zero.  Right
    /// for 0 to 32 as far as the magnitudes in use are normal numbers of e5m2; the bytes of others may be wrong.  Where all codes of
    /// a group are zero it may be any byte.
    MEGA_DEVICE explicit Magnitudes(u32 exponent)
        : low(exponent * kLowStep + kLow), high(exponent * kHighStep + kHigh) {}
};

}   // namespace megamoe
