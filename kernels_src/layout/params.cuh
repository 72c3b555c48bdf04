// The one kernel argument.  Python knows it by `megamoe_jit/_spec/abi.py`, which `make abi` writes from this and other headers;
// its size is checked again before the launch.
//
// Symmetric memory (one allocation per rank, at p.peers[rank]; peers read or write it):
//   x, x_scales, topk_ids, topk_weights   the rank's inputs; ids and weights of routed slots alone, see stage/inputs.cuh
//   expert_offsets, sorted_pairs          (token, slot) pairs of each rank that name its experts, sorted by expert, and where
//                                         each expert's begin: dispatch/pairs.cuh
//   signals                               epoch that each rank has reached, by meeting and rank
//   combine                               bf16 [token][slot][hidden]: what the experts' ranks send back
// Local memory: rows sorted by expert, each expert's first row at a multiple of 128.  Origins and counters are kept for
// every row there can be; the rows themselves live in pools of pool_rows rows that are used as rings (sched/experts.cuh).
#pragma once
#include "base/constants.cuh"
#include "ptx/tma.cuh"

namespace megamoe {

struct alignas(64) Params {
    ptx::TensorMap act1, act2;               // activations of GEMM 1 and GEMM 2
    ptx::TensorMap act1_small, act2_small;   // the same in smaller boxes

    u64 peers[kMaxRanks];   // base of each rank's symmetric buffer; below, byte offsets in it
    u64 x, x_scales, topk_ids, topk_weights, expert_offsets, sorted_pairs, signals, combine;

    u8* act1_pool;        // e4m3 [pool_rows][hidden]
    float* act1_scales;   // [hidden / 128][pool_rows]
    u8* act2_pool;        // e4m3 [pool_rows][intermediate]
    float* act2_scales;   // [intermediate / 128][pool_rows]
    u32* row_pairs;       // [rows] rank << 20 | token * topk + slot
    u32* act1_ready;      // [counters] rows that have arrived
    u32* act2_ready;      // [counters] tiles of GEMM 1 that are done
    // [counters] tiles of GEMM 2 that are done; only kept when the pools are rings
    u32* act2_done;
    u32* slice_counts;   // [sort_blocks][experts] pairs of each expert in each block's slice
    u32* control;        // see Control
    // in tiles of 256 x 128 codes, swizzled: megamoe_jit/_layer/fp8.py
    const u8* weight1;
    const u8* weight2;             // the same; the last tile of an expert may have 128 rows
    const float* weight1_scales;   // [local experts][2 * intermediate / 128][hidden / 128]
    const float* weight2_scales;   // [local experts][hidden / 128][intermediate / 128]
    u16* y;                        // bf16 [tokens][hidden]
    i32* stats;   // [local experts that are not shared] or null: rows received, added to
    u32* fault;   // four words the host can read; see comm/fault.cuh
    // records of comm/timeline.cuh; not read unless the kernel was compiled for it
    u64* timeline;

    u64 timeout_ns;
    // item_shift: see dispatch/gather.cuh
    u32 tokens, rank, pool_rows, counters, sort_blocks, item_shift, lag_tiles;
    float clamp;
    // 1: each side of the L2 shall take every other column of tiles, see sched/order.cuh; 0: all
    // take all
    u32 want_sides;
    u32 side_of_sm[kSideWords];   // a bit of each SM

    // inputs as the caller has them, for a kernel that stages them itself: stage/inputs.cuh
    const u8* raw_x;         // bf16, rows raw_x_stride bytes apart
    const u8* raw_ids;       // rows raw_ids_stride numbers apart
    const u8* raw_weights;   // rows raw_weights_stride numbers apart
    u64 raw_x_stride;
    u32 raw_ids_stride, raw_weights_stride, raw_formats;
    float weight_factor;   // router weights are multiplied with it

    float shared_weight;   // of every shared expert's row
    u32 most_pairs;        // of a rank: how far apart two ranks' lists of sorted pairs begin
    u32 expand_every;      // of so many blocks one expands weights, before it does anything else
    u32 unused[13];
    // [ranks][tokens], of several ranks: where in the pool a row lies already, see dispatch/places.cuh
    u32* row_places;

    // of a kernel that expands weights in memory (expand/): the packed ones, of which it makes those at weight1 and weight2
    const u8* packed1;
    const u8* packed2;
    u8* expanded1;
    u8* expanded2;
    u32* expanded;   // [local experts][tiles of columns of both products] pieces that are done

    // an exponent for each of a format's groups, in tiles as its codes (megamoe_jit/_layer/mxfp4.py); null without groups
    const u8* weight1_exponents;
    const u8* weight2_exponents;
};

/// Words of `Params::control`.
enum Control : u32 {
    kControlGridBarrier = 0,
    kControlEpoch = 2,
    kControlSides = 3,
    kControlTicket = 32,
    kControlTicketStride = 16,   // one for each side
    kControlWords = 64,
};

/// Typed view of a field of rank `r`'s symmetric buffer.
template <class T> MEGA_DEVICE T* symmetric(const Params& p, u32 rank, u64 offset) {
    return reinterpret_cast<T*>(p.peers[rank] + offset);
}

}   // namespace megamoe
