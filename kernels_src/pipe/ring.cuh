// Positions in the rings of shared memory: stages, tile slots, dispatch slots, packed k-blocks.  `stage` is the place, `parity` that
// of the mbarrier phase of its current use.  A consumer waits on `full` with `parity`; a producer waits on `empty` with `parity ^ 1`,
// which a fresh mbarrier passes at once.
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
