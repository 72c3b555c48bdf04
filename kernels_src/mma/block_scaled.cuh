// D[m, n] = sum over 128-deep blocks b of  sa[m, b] * sb[n, b] * (A[m, b] . B[n, b])     exactly, in two levels.
//
// Each block's product goes into a fresh accumulator on the tensor cores and is then promoted into the result by an
// FP32 FMA with its scales.  A warpgroup's 64 x 256 result is computed in four quarters of 64 columns with two fresh
// accumulators in turn: while one quarter is promoted, the next one's WGMMA runs.  ptxas serialises everything when a
// WGMMA is in flight across a loop's back edge, so several k-blocks are written out per turn of the loop, and the
// pipeline drains once per turn.
//
//   step i            0       1         2         3         4                  5 ...
//   issue quarter     0 of A  1 of A    2 of A    3 of A    0 of B (waits for full[B])
//   wait for, promote -       0 of A    1 of A    2 of A    3 of A             0 of B
//   then              load A's scales   A's 2nd half        release A, load B's scales
//
// Registers: 128 of result and 2 x 32 in flight, of 216.
//
//   full[stage]    waited for here     arrived by the two load warps (roles/load.cuh)
//   empty[stage]   arrived here, one lane per warp, when the last quarter of the stage has been read
#pragma once
#include "comm/fault.cuh"
#include "layout/shared.cuh"
#include "mma/scales.cuh"
#include "pipe/ring.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

/// A warpgroup's 64 x 256 result.  Thread t of a warp holds, of every 8 columns, rows t/4 and t/4 + 8, columns 2(t%4)
/// and the next: registers 4i, 4i+1 (row t/4) and 4i+2, 4i+3 (row t/4 + 8) for columns 8i of a quarter.
struct Result {
    float quarter[4][32];
};

/// Issues the four 32-deep steps of one quarter into a fresh accumulator.
MEGA_DEVICE void issue_quarter(float (&fresh)[32], u64 a, u64 b, u32 q) {
    ptx::pin(fresh);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < 4; ++k)
        ptx::wgmma_m64n64k32(fresh, a + k * ptx::kDescriptorK32, b + q * ptx::kDescriptorRows64 + k * ptx::kDescriptorK32, k);
    ptx::wgmma_commit();
}

/// quarter q += fresh * scales.
MEGA_DEVICE void promote_quarter(Result& result, float (&fresh)[32], const BlockScales& s, u32 q) {
    ptx::pin(fresh);
    const float scale[2][2] = {{s.act[0] * s.weight[0], s.act[1] * s.weight[0]}, {s.act[0] * s.weight[1], s.act[1] * s.weight[1]}};
#pragma unroll
    for (u32 i = 0; i < 32; ++i) {
        float& d = result.quarter[q][i];
        d = __fmaf_rn(fresh[i], scale[i / 4 % 2][i / 2 % 2], d);
    }
}

template <class C> struct MainLoop {
    const Shared<C>& shared;
    Ring<C::kStages> ring;
    u32 row;   // first row of the activation tile that this warpgroup multiplies

    MEGA_DEVICE void release(u32 stage) const {
        __syncwarp();   // all lanes have read their scales, and none still looks at this phase
        if (ptx::lane_id() == 0) ptx::mbarrier_arrive(shared.empty(stage));
    }

    /// kBlocks k-blocks, written out; nothing is in flight before or after.
    template <u32 kBlocks> MEGA_DEVICE void turn(Result& result) {
        constexpr u32 kSteps = 4 * kBlocks;
        float fresh[2][32];
        BlockScales scales;
        u64 a = 0, b = 0;
        u32 stage = 0;
#pragma unroll
        for (u32 i = 0; i <= kSteps; ++i) {   // issues quarter i, then promotes quarter i - 1
            const u32 last_stage = stage, q = i % 4;
            if (i < kSteps) {
                if (q == 0) {
                    stage = ring.stage;
                    wait_barrier_watched(shared.full(stage), ring.parity);
                    ring.advance();
                    a = ptx::matrix_descriptor(shared.acts(stage) + row * kBlockK);
                    b = ptx::matrix_descriptor(shared.weights(stage));
                }
                issue_quarter(fresh[i % 2], a, b, q);
                if (i > 0) ptx::wgmma_wait<1>();
            } else {
                ptx::wgmma_wait<0>();
            }
            if (i > 0 && q == 0) release(last_stage);
            if (i > 0) promote_quarter(result, fresh[(i - 1) % 2], scales, (i - 1) % 4);
            if (i < kSteps && q == 0) scales.load(shared.act_scales(stage) + row * 4, shared.weight_scales(stage));
            if (q == 2) scales.half(1);
        }
    }

    MEGA_DEVICE void run(Result& result, u32 k_blocks) {
#pragma unroll
        for (u32 q = 0; q < 4; ++q)
#pragma unroll
            for (u32 i = 0; i < 32; ++i) result.quarter[q][i] = 0;
        u32 left = k_blocks;
        for (; left >= C::kUnroll; left -= C::kUnroll) turn<C::kUnroll>(result);
        if constexpr (C::kHidden / kBlockK % C::kUnroll != 0 || C::kIntermediate / kBlockK % C::kUnroll != 0)
            for (; left > 0; --left) turn<1>(result);
    }

    /// Hands the stages back unread: this warpgroup's rows are all padding.
    MEGA_DEVICE void skip(u32 k_blocks) {
        for (; k_blocks > 0; --k_blocks) {
            wait_barrier_watched(shared.full(ring.stage), ring.parity);
            release(ring.stage);
            ring.advance();
        }
    }
};

}  // namespace megamoe
