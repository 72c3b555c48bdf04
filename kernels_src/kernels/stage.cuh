// The staging kernel, a launch before the layer's own (`megamoe_jit/_layer/stage.py`): it brings a batch into a buffer.  Rows are
// quantised, ids and router weights converted, and padding rows, behind the tokens, masked.
//
// Blocks take groups of columns and pairs in turn.  They are small, so that several share an SM and hide each other's waits.
#pragma once
#include "stage/inputs.cuh"

namespace megamoe {

// kStageGroups: groups of 128 columns in flight in each half of a warp
constexpr u32 kStageThreads = 256, kStageGroups = 4;

struct alignas(64) StageParams {
    const u8* x;         // rows x_stride bytes apart
    const u8* ids;       // rows ids_stride numbers apart
    const u8* weights;   // rows weights_stride numbers apart
    // scales of rows that are e4m3 already: rows scales_row, columns scales_column bytes apart
    const u8* x_scales;
    u8* out_x;            // e4m3 [rows][hidden]
    float* out_scales;    // [rows][hidden / 128]
    i64* out_ids;         // [rows][topk]
    float* out_weights;   // [rows][topk]
    u64 x_stride, scales_row, scales_column;
    u32 ids_stride, weights_stride, formats, tokens;
    // rows of ids and weights that are written; those from `tokens` on are padding and get -1 and 0
    u32 masked;
    u32 hidden, topk;
    float weight_factor;
    u32 unused[2];
};
static_assert(sizeof(StageParams) == 128, "StageParams changed: run `make abi`");

MEGA_DEVICE void stage_pairs(const StageParams& p, u32 thread, u32 threads) {
    for (u32 i = thread; i < p.masked * p.topk; i += threads) {
        const u32 token = i / p.topk, slot = i - token * p.topk;
        const bool real = token < p.tokens;
        p.out_ids[i] = real ? raw_id(p.ids, u64(token) * p.ids_stride + slot, p.formats) : -1;
        p.out_weights[i] = real ? raw_weight(p.weights, u64(token) * p.weights_stride + slot,
                                             p.formats) *
                                      p.weight_factor
                                : 0.0f;
    }
}

/// Format of rows that are e4m3 codes already, and come with their scales.
struct E4m3 {
    static constexpr u32 kBytes = 1;
};

MEGA_DEVICE float raw_scale(const StageParams& p, u32 row, u32 column) {
    const u32 packed = p.formats & kRawScalesPacked ? 4 : 1;
    const u8* at = p.x_scales + row * p.scales_row + column / packed * p.scales_column +
                   column % packed;
    if (!(p.formats & kRawScalesE8m0)) return *reinterpret_cast<const float*>(at);
    const u32 exponent = *at;   // 0 is 2^-127, 255 NaN
    return __uint_as_float(exponent == 0 ? 1 << 22 : exponent == 255 ? 0x7FFFFFFF : exponent << 23);
}
MEGA_DEVICE void copy_rows(const StageParams& p, u32 thread, u32 threads) {
    const u32 vectors = p.hidden / 16, blocks = p.hidden / kQuantBlock;
    for (u32 i = thread; i < p.tokens * vectors; i += threads) {
        const u32 row = i / vectors;
        ptx::store16(p.out_x + u64(i) * 16,
                     ptx::load16(p.x + row * p.x_stride + (i - row * vectors) * 16));
    }
    for (u32 i = thread; i < p.tokens * blocks; i += threads)
        p.out_scales[i] = raw_scale(p, i / blocks, i % blocks);
}

/// Rows of numbers in format T.
template <class T> MEGA_DEVICE void stage(const StageParams& p) {
    const u32 threads = gridDim.x * kStageThreads, blocks = p.hidden / kQuantBlock;
    if constexpr (T::kBytes == 1) {
        copy_rows(p, blockIdx.x * kStageThreads + threadIdx.x, threads);
    } else {
        const u64 low_bits = reinterpret_cast<u64>(p.x) | p.x_stride;
        const RowsToQuantise rows{p.x,    p.x_stride,        p.out_x,           p.out_scales,
                                  blocks, p.tokens * blocks, low_bits % 16 == 0};
        quantise_rows<T, kStageGroups>(rows, ptx::warp_id() * gridDim.x + blockIdx.x,
                                       threads / kWarp);
    }
    // in the opposite order of blocks: those that had no rows begin
    stage_pairs(p, (gridDim.x - 1 - blockIdx.x) * kStageThreads + threadIdx.x, threads);
}

}   // namespace megamoe
