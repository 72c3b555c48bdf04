// The main loop of pingpong, cooperative and prefill, in each math warpgroup (roles/math.cuh):
//
//   D[m, n] = sum over k-blocks b of  sa[m, b] * sb[n, b] * (A[m, b] . B[n, b])
//
// Each k-block's product goes into a fresh accumulator of the tensor cores, and is then promoted: multiplied by its scales and added
// to the result by an FP32 FMA.  A warpgroup's 64 x 256 result is computed in four quarters of 64 columns with two fresh accumulators
// in turn: while one quarter is promoted, the next one's WGMMA runs.  ptxas serialises everything when a WGMMA is in flight across a
// loop's back edge, so two k-blocks are written out per iteration (one where a depth has an odd number of them), and the pipeline
// drains once per iteration.
//
//   step i            0            1         2         3         4                 5 ...
//   before            wait, load   -         -         -         wait, load        -
//                     A's scales                                 B's scales
//   issue quarter     0 of A       1 of A    2 of A    3 of A    0 of B            1 of B
//   wait for          -            0 of A    1 of A    2 of A    3 of A, release   0 of B
//   promote           -            0 of A    1 of A    2 of A    3 of A            0 of B
//
// A quarter's WGMMA takes about 200 cycles.  If a warpgroup does anything longer than that between two issues, the tensor cores run
// dry, so (each of these was measured, see docs/perf-log.md)
//   - descriptors are computed before the stage is waited for, and scales are loaded before its first WGMMA is issued: both
//     are there when the quarter before has been promoted
//   - before it drains, an iteration tests whether the next one's first stage is full, so that the next need not
//   - promotion takes the eight numbers that share a scale one after the other: the tensor cores use the ports of the register file
//     at the same time, and an operand that was just read need not be read again
//
// Registers: 128 of result and 2 x 32 of fresh accumulators, of 216.
//
//   full[stage]    waited for here; arrivals: the two load lanes and their bytes (roles/load.cuh)
//   empty[stage]   arrived on here, by one lane of each warp, when the WGMMA of the stage's last quarter is done
#pragma once
#include "mma/scales.cuh"
#include "mma/stages.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

/// A warpgroup's 64 x 256 result.  Thread t of a warp holds, of every 8 columns, rows t/4 and t/4 + 8, columns 2(t%4)
/// and the next: registers 4i, 4i+1 (row t/4) and 4i+2, 4i+3 (row t/4 + 8) for columns 8i of a quarter.
struct Result {
    float quarter[4][32];

    MEGA_DEVICE void clear() {
#pragma unroll
        for (u32 q = 0; q < 4; ++q)
#pragma unroll
            for (u32 i = 0; i < 32; ++i) quarter[q][i] = 0;
    }
};

/// K-blocks per iteration, of which the depths of both GEMMs are multiples.  Four would be 0.2 % faster than two and take a seventh
/// longer to compile; one is 1.7 % slower, 2 to 4 % from 8192 tokens on.
// clang-format off
template <class C>
constexpr u32 kKBlocksPerIteration =
    C::kHidden / kBlockK % 2 == 0 && C::kIntermediate / kBlockK % 2 == 0 ? 2 : 1;
// clang-format on

/// A fresh accumulator: of one quarter's product of a k-block.
using Fresh = ptx::Accumulator<32>;

/// Issues one quarter's product of a k-block into a fresh accumulator, as a WGMMA group of its own.
template <ptx::Codes kWeights>
MEGA_DEVICE void issue_quarter(Fresh& fresh, u64 a, u64 b, u32 q) {
    ptx::wgmma_fence();
    fresh.template multiply<kWeights>(a, b + q * ptx::kDescriptorRows64);
    ptx::wgmma_commit();
}

/// quarter q += fresh * scales.
MEGA_DEVICE void promote_quarter(Result& result, const Fresh& fresh, const BlockScales& s, u32 q) {
#pragma unroll
    // four runs of eight numbers with one scale each: even groups of eight columns (gate, in GEMM 1), rows t/4, then rows
    // t/4 + 8; then odd groups (up) likewise
    for (u32 group = 0; group < 4; ++group) {
        const u32 odd = group / 2, below = group % 2;
        const float scale = s.act[below] * s.weight[q / 2][odd];
#pragma unroll
        for (u32 i = odd * 4 + below * 2; i < 32; i += 16)
            fresh.add_to(result.quarter[q], i, i + 8, scale, scale, scale, scale);
    }
}

template <class C> struct MainLoop : StageReader<C> {
    using Base = StageReader<C>;
    using Base::Base, Base::shared, Base::ring, Base::row, Base::thread, Base::release;
    // the ring's stage has been seen full.  After a tile's last iteration that is a stage of another tile, maybe of the other
    // warpgroup; it is not used then, since each tile makes a main loop of its own
    bool ready = false;

    /// One iteration, unrolled; no WGMMA is in flight before or after.
    MEGA_DEVICE void iterate(Result& result) {
        constexpr u32 kSteps = 4 * kKBlocksPerIteration<C>;
        const u32 my_row = row + thread / kWarp % 4 * 16 + thread % kWarp / 4;
        Fresh fresh[2];
        BlockScales scales, next;
        u64 a = 0, b = 0;
        u32 stage = 0;
#pragma unroll
        for (u32 i = 0; i <= kSteps; ++i) {   // issues quarter i, then promotes quarter i - 1
            const u32 last_stage = stage, q = i % 4;
            if (i < kSteps) {
                if (q == 0) {
                    stage = ring.stage;
                    a = ptx::matrix_descriptor(shared.acts(stage) + row * kBlockK);
                    b = ptx::matrix_descriptor(shared.weights(stage));
                    ptx::pin(a, b);
                    if (i > 0 || !ready) wait_barrier_watched(shared.full(stage), ring.parity);
                    ring.advance();
                    next.load(shared.act_scales(stage) + my_row * 4, shared.weight_scales(stage));
                }
                issue_quarter<C::Weights::kCodes>(fresh[i % 2], a, b, q);
                if (i > 0) ptx::wgmma_wait<1>();
            } else {
                ready = ptx::mbarrier_test(shared.full(ring.stage), ring.parity);
                ptx::wgmma_wait<0>();
            }
            if (i > 0 && q == 0) release(last_stage);
            if (i > 0) promote_quarter(result, fresh[(i - 1) % 2], scales, (i - 1) % 4);
            // not before: what has just been promoted was the last quarter of the k-block before
            if (i < kSteps && q == 0) scales = next;
        }
    }

    MEGA_DEVICE void run(Result& result, u32 k_blocks) {
        result.clear();
        for (; k_blocks >= kKBlocksPerIteration<C>; k_blocks -= kKBlocksPerIteration<C>)
            iterate(result);
    }
};

}   // namespace megamoe
