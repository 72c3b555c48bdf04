// What codes of four bits stand for, as e5m2.
#pragma once
#include "base/types.cuh"

namespace megamoe {

/// The e5m2 bytes of the eight magnitudes times a power of two: 0, 0.5, 1, 1.5 and 2, 3, 4, 6.
struct Magnitudes {
    static constexpr u32 kLowStep = 0x04040400, kHighStep = 0x04040404,
                         kLow = 0x3E3C3800 - 16 * kLowStep, kHigh = 0x46444240 - 16 * kHighStep;
    u32 low, high;

    /// `exponent`: 16 more than that of the power.  A step of it is 4 in the byte of every magnitude but zero, which stays zero.
    /// 0 to 32, as long as the magnitudes that are in use are normal numbers of e5m2; others may wrap.  Any byte for zeros alone.
    MEGA_DEVICE explicit Magnitudes(u32 exponent)
        : low(exponent * kLowStep + kLow), high(exponent * kHighStep + kHigh) {}
};

}   // namespace megamoe
