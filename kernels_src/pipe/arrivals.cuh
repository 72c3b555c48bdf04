// Who arrives on an mbarrier where a warp has come to an end with a place of a ring, and how many arrivals that is: one lane's, after
// a `__syncwarp` that orders what the others have done before it.
//
// racecheck of compute-sanitizer does not see that order where ptxas emits no instruction for the `__syncwarp`.  With kWarp in place
// of 1 below all lanes arrive, and it sees it; such kernels are made to be judged alone (docs/protocol.md).
#pragma once
#include "base/constants.cuh"

namespace megamoe {

constexpr u32 kArrivingLanes = 1;   // of a warp

/// Arrivals of so many warps.
constexpr u32 arrivals_of(u32 warps) { return warps * kArrivingLanes; }
/// Whether this thread arrives for its warp.  `thread` may be counted from the first of any warp.
MEGA_DEVICE bool arrives(u32 thread) { return thread % kWarp < kArrivingLanes; }

}   // namespace megamoe
