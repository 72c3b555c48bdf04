// The one kernel argument, filled by `megamoe_jit/_layer/bound_kernel.py`.  Python knows its offsets by
// `megamoe_jit/_spec/abi.py`, which `make abi` writes from this and other headers; its size is checked again before the launch.
//
// Symmetric memory is one allocation per rank, at p.peers[rank], which peers read or write.  Its sections are byte offsets, the
// same on all ranks (sizes: `megamoe_jit/_device/layout.py`):
//   x, x_scales                  the rank's input rows: e4m3 [tokens][hidden], float [tokens][hidden / 128]
//   topk_ids, topk_weights       of its tokens, for the router's slots alone: i64 and float [tokens][routed slots]
//   expert_offsets, sorted_pairs the pairs of every rank that name this rank's experts, sorted by expert, and where each
//                                expert's pairs begin (dispatch/pairs.cuh)
//   signals                      the epoch that each rank has reached, [meeting][rank] (comm/barriers.cuh)
//   combine                      bf16 [token][slot][hidden]: the combine slots, which the experts' ranks write
// Local memory is this rank's alone.  Rows are numbered through all its experts, each expert's first row at a multiple of 128.
// Origins and counters exist for every row that there can be; activations live in pools of `pool_rows` rows, which are used as
// rings when a batch has more rows (sched/experts.cuh).
#pragma once
#include "base/constants.cuh"
#include "ptx/tma.cuh"

namespace megamoe {

struct alignas(64) Params {
    ptx::TensorMap act1, act2;   // the pools of GEMM 1 and GEMM 2, in boxes of 64 rows x 128 bytes
    ptx::TensorMap act1_small, act2_small;   // the same in boxes of 16 rows (roles/load.cuh)

    u64 peers[kMaxRanks];   // base of each rank's symmetric buffer; below, byte offsets in it
    u64 x, x_scales, topk_ids, topk_weights, expert_offsets, sorted_pairs, signals, combine;

    u8* act1_pool;        // e4m3 [pool_rows][hidden]
    float* act1_scales;   // [hidden / 128][pool_rows]
    u8* act2_pool;        // e4m3 [pool_rows][intermediate]
    float* act2_scales;   // [intermediate / 128][pool_rows]
    u32* row_pairs;       // [rows] origin of each row: rank << 20 | token * topk + slot
    // one word per 64 rows, zeroed by the head of every launch:
    u32* act1_ready;   // [counters] rows that have arrived in the pool of GEMM 1
    u32* act2_ready;   // [counters] tiles of GEMM 1 that are stored in the pool of GEMM 2
    // [counters] tiles of GEMM 2 that are done; only counted when the pools are rings
    u32* act2_done;
    u32* slice_counts;   // [sort_blocks][experts] pairs of each expert in each sort block's slice
    u32* control;        // see Control
    // codes in tiles of 256 rows, k-block after k-block of 256 x 128, each swizzled as shared memory wants it
    // (megamoe_jit/_layer/fp8.py)
    const u8* weight1;
    const u8* weight2;             // the same; the last tile of an expert may have 128 rows
    const float* weight1_scales;   // [local experts][2 * intermediate / 128][hidden / 128]
    const float* weight2_scales;   // [local experts][hidden / 128][intermediate / 128]
    u16* y;                        // bf16 [tokens][hidden]
    i32* stats;   // [local routed experts] or null: the rows each has received are added to it
    u32* fault;   // in host memory: four words of a record and one that says it is taken (comm/fault.cuh)
    // records of comm/timeline.cuh; only read by kernels with Config::kTimeline
    u64* timeline;

    // deadline of a wait with patience 1 (comm/fault.cuh)
    u64 timeout_ns;
    // tokens of this rank; rows per dispatch item = 1 << item_shift (dispatch/gather.cuh); lag_tiles: sched/order.cuh
    u32 tokens, rank, pool_rows, counters, sort_blocks, item_shift, lag_tiles;
    float clamp;   // bound of SwiGLU's inputs; infinity for none
    // 1: each side of the L2 takes every other column of tiles if the blocks allow it (comm/sides.cuh); 0: one order for all
    u32 want_sides;
    u32 side_of_sm[kSideWords];   // bit i: the side of SM i

    // the caller's tensors, for a kernel that stages its inputs itself (Inputs::raw, stage/inputs.cuh)
    const u8* raw_x;         // bf16, rows raw_x_stride bytes apart, each 16-byte aligned
    const u8* raw_ids;       // rows raw_ids_stride numbers apart
    const u8* raw_weights;   // rows raw_weights_stride numbers apart
    u64 raw_x_stride;
    u32 raw_ids_stride, raw_weights_stride, raw_formats;
    float weight_factor;   // router weights are multiplied with it

    float shared_weight;   // weight with which combine adds the rows of shared experts
    u32 most_pairs;   // room for pairs of one rank: distance between two ranks' lists of sorted pairs
    u32 expand_every;   // one block of this many expands weights before its first tile; 0: see ExpandShare
    u32 unused[13];
    // [ranks][capacity], with several ranks: where in the pool a token's row lies already (dispatch/places.cuh)
    u32* row_places;

    // of a kernel that expands packed weights in memory (expand/ahead.cuh): packed codes, and where their e5m2 goes, which is
    // what weight1 and weight2 point at then
    const u8* packed1;
    const u8* packed2;
    u8* expanded1;
    u8* expanded2;
    u32* expanded;   // [local experts][columns of GEMM 1, then of GEMM 2] pieces that are done

    // one byte for each group of 32 packed codes, in the order of the codes (megamoe_jit/_layer/mxfp4.py); null for FP8
    const u8* weight1_exponents;
    const u8* weight2_exponents;
};

/// Words of `Params::control`, which outlive a launch.  The tickets have 64 bytes each to themselves.
enum Control : u32 {
    kControlGridBarrier = 0,     // comm/barriers.cuh; never reset
    kControlEpoch = 2,           // of the last launch, with several ranks
    kControlSides = 3,           // comm/sides.cuh; zero between launches
    kControlTicket = 32,         // next ticket of side 0; block 0 resets both
    kControlTicketStride = 16,   // from there to that of side 1
    kControlWords = 64,
};

/// Typed view of a section of a rank's symmetric memory, by its offset.
template <class T> MEGA_DEVICE T* symmetric(const Params& p, u32 rank, u64 offset) {
    return reinterpret_cast<T*>(p.peers[rank] + offset);
}

}   // namespace megamoe
