// Staging as a launch of its own: rows are quantised, ids and router weights converted, rows that are no tokens masked.
//
// Blocks take groups of columns and pairs in turn.  They are small, so that as many as fit an SM hide each other's waits.
#pragma once
#include "stage/inputs.cuh"

namespace megamoe {

constexpr u32 kStageThreads = 256, kStageGroups = 4;   // of 128 columns in flight in each half of a warp

struct alignas(64) StageParams {
    const u8* x;         // rows x_stride bytes apart
    const u8* ids;       // rows ids_stride numbers apart
    const u8* weights;   // rows weights_stride numbers apart
    const u8* x_scales;  // of codes alone: rows scales_row, columns scales_column numbers apart
    u8* out_x;           // e4m3 [rows][hidden]
    float* out_scales;   // [rows][hidden / 128]
    i64* out_ids;        // [rows][topk]
    float* out_weights;  // [rows][topk]
    u64 x_stride, scales_row, scales_column;
    u32 ids_stride, weights_stride, formats, tokens;
    u32 masked;          // rows of ids and weights that are written: those from `tokens` on get -1 and 0
    u32 hidden, topk;
    float weight_factor;
    u32 unused[2];
};
static_assert(sizeof(StageParams) == 128, "StageParams changed: change megamoe_jit/_stage.py with it");

MEGA_DEVICE void stage_pairs(const StageParams& p, u32 thread, u32 threads) {
    for (u32 i = thread; i < p.masked * p.topk; i += threads) {
        const u32 token = i / p.topk, slot = i - token * p.topk;
        const bool real = token < p.tokens;
        p.out_ids[i] = real ? raw_id(p.ids, u64(token) * p.ids_stride + slot, p.formats) : -1;
        p.out_weights[i] = real ? raw_weight(p.weights, u64(token) * p.weights_stride + slot, p.formats) * p.weight_factor : 0.0f;
    }
}

template <class T> MEGA_DEVICE void stage(const StageParams& p) {
    ptx::launch_dependents();
    const u32 threads = gridDim.x * kStageThreads, blocks = p.hidden / kQuantBlock;
    const u64 places = reinterpret_cast<u64>(p.x) | p.x_stride;
    const Rows rows{p.x, p.x_stride, p.out_x, p.out_scales, blocks, p.tokens * blocks, places % 16 == 0};
    quantise_rows<T, kStageGroups>(rows, ptx::warp_id() * gridDim.x + blockIdx.x, threads / kWarp);
    stage_pairs(p, (gridDim.x - 1 - blockIdx.x) * kStageThreads + threadIdx.x, threads);   // blocks with no rows first
}

}  // namespace megamoe
