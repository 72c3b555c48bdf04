// Epilogue of GEMM 1, by each math warp for its 16 rows (roles/math.cuh): SwiGLU, one scale per row over the tile's 128 outputs, e4m3
// codes, into the pool of GEMM 2.
//
// Gate and up columns alternate by eights, so gate and up of an output are in the same thread, and all 128 outputs of a row in the
// four lanes of a quad: the row's largest magnitude is two shuffles away.
//
// Ordering: GEMM 2 reads these rows by TMA, in any block.  Every lane has a proxy fence after its stores; then the warp arrives on
// tile_stored, and the publisher releases act2_ready (roles/publish.cuh).
#pragma once
#include "epilogue/quotient.cuh"
#include "epilogue/silu.cuh"
#include "epilogue/staging.cuh"
#include "mma/block_scaled.cuh"
#include "ptx/convert.cuh"

namespace megamoe {

template <class C> struct SwigluQuant {
    const Params& p;
    const Staging staging;
    u32 pool_row;   // first of this warp's 16 rows in the pool
    u32 rows;       // valid rows from there to the end of the tile; 16 or more: all of this warp's
    u32 n;

    /// Writes silu(gate) * up over the gate's registers, and finds the largest magnitude in rows t/4 and t/4 + 8.  `fmaxf` ignores NaN, as
    /// it should: the scale is that of the other values, and the NaN is in the codes.
    MEGA_DEVICE void activate(Result& result, float (&largest)[2]) const {
        largest[0] = largest[1] = 0;
#pragma unroll
        for (u32 q = 0; q < 4; ++q)
#pragma unroll
            for (u32 i = 0; i < 16; ++i) {
                float& gate = result.quarter[q][i / 4 * 8 + i % 4];
                const float up = result.quarter[q][i / 4 * 8 + 4 + i % 4];
                gate = swiglu<C>(gate, up, p.clamp);
                largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(gate));
            }
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
        }
    }

    /// Codes of two groups of eight outputs, of row t/4 or (half = 1) t/4 + 8: lanes exchange them in pairs, so that each stores four
    /// consecutive ones.
    MEGA_DEVICE void stage_codes(const float (&quarter)[32], u32 q, u32 pair, u32 half,
                                 float inverse) const {
        const u32 i = pair * 16 + half * 2, lane = staging.lane;
        const u32 own = ptx::pack_e4m3(quarter[i], quarter[i + 1], quarter[i + 8], quarter[i + 9],
                                       inverse, inverse);
        const u32 other = __shfl_xor_sync(~0u, own, 1);
        const u32 codes = ptx::choose_bytes(own, other, lane % 2 == 0 ? 0x5410 : 0x3276);
        ptx::store4_shared(
            staging.chunk(half * 8 + lane / 4, q * 2 + pair) + lane % 2 * 8 + lane % 4 / 2 * 4,
            codes);
    }

    MEGA_DEVICE void run(Result& result) const {
        float largest[2];
        activate(result, largest);
        const u32 lane = staging.lane;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float scale = quant_scale(fmaxf(largest[half], kLeastMagnitude)),
                        inverse = reciprocal(scale);
            const u32 row = half * 8 + lane / 4;
            if (lane % 4 == 0 && row < rows)
                p.act2_scales[u64(n) * p.pool_rows + pool_row + row] = scale;
#pragma unroll
            for (u32 q = 0; q < 4; ++q)
#pragma unroll
                for (u32 pair = 0; pair < 2; ++pair)
                    stage_codes(result.quarter[q], q, pair, half, inverse);
        }
        __syncwarp();
        Vec16 v[Staging::kPasses];
        staging.read_all(v);
#pragma unroll
        for (u32 i = 0; i < Staging::kPasses; ++i) {
            const u32 row = staging.row(i);
            u8* target = p.act2_pool + u64(pool_row + row) * C::kIntermediate + n * kQuantBlock +
                         staging.column() * 16;
            if (row < rows) ptx::store16(target, v[i]);
        }
        ptx::fence_async_global();   // GEMM 2 reads these rows by TMA
        __syncwarp();
    }
};

}   // namespace megamoe
