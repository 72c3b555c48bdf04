// Prefix sums by a warp: where each expert's pairs and rows begin (dispatch/sort.cuh), and which place a row has among those of its
// node (kernels/nodes.cuh).
#pragma once
#include "base/constants.cuh"
#include "ptx/control.cuh"

namespace megamoe {

/// Exclusive prefix sums over as many values as there are calls times 32, in the order of calls and in each of lanes.
struct WarpScan {
    u32 total = 0;   // of all values so far; in all lanes
    /// The sum of all values before this lane's.  All lanes must call it.
    MEGA_DEVICE u32 exclusive(u32 value) {
        u32 sum = value;
// like all loops of the head: unrolled they take long to compile, and nothing is gained
#pragma unroll 1
        for (u32 d = 1; d < kWarp; d *= 2) {
            const u32 other = __shfl_up_sync(~0u, sum, d);
            if (ptx::lane_id() >= d) sum += other;
        }
        const u32 before = total + sum - value;
        total += __shfl_sync(~0u, sum, kWarp - 1);
        return before;
    }
};

}   // namespace megamoe
