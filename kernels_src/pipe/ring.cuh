// Positions in the rings of shared memory: which stage, and the parity of its current use.
#pragma once
#include "base/constants.cuh"

namespace megamoe {

/// Position in a ring of kDepth entries, `begin` steps after its start.
template <u32 kDepth> struct Ring {
    u32 stage, parity;

    MEGA_DEVICE explicit Ring(u32 begin = 0) : stage(begin % kDepth), parity(begin / kDepth & 1) {}
    MEGA_DEVICE void advance() {
        if (++stage == kDepth) stage = 0, parity ^= 1;
    }
};

}   // namespace megamoe
