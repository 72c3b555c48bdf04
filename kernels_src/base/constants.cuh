// Constants that more than one folder depends on.  Those that Python needs too reach it by `make abi`.
#pragma once
#include "base/types.cuh"

namespace megamoe {

// quantisation block: one scale per row and 128 columns of activations, and per 128 x 128 of weights
constexpr u32 kQuantBlock = 128;
// depth (K) of a pipeline stage, a k-block: one quantisation block, 128 bytes of FP8
constexpr u32 kBlockK = 128;
// columns (N) of a tile; in GEMM 1 these are 128 gate and 128 up columns, alternating by eights
constexpr u32 kBlockN = 256;
// packed weights: bits of a code, and codes along K that share an exponent, a byte
constexpr u32 kPackedBits = 4, kPackedGroup = 32;
constexpr u32 kPoolAlign = 128;    // an expert's rows start at a multiple of this in the pools
constexpr u32 kCounterRows = 64;   // rows that share one word of act1_ready, act2_ready, act2_done
// an expert's rows are cut into units of about this many, each of which stays in L2 while it is worked on (sched/order.cuh)
constexpr u32 kUnitRows = 1024;
constexpr u32 kMaxRanks = 8;
constexpr u32 kSideWords = 5;          // of Params::side_of_sm: a bit for each of 160 SMs
constexpr u32 kDispatchChunk = 2048;   // bytes of a dispatch slot: of one bulk copy of dispatch
// depth of the ring in which the scheduler publishes tiles (pipe/tile_slots.cuh), and bytes of a place of it
constexpr u32 kTileSlots = 4, kTileSlotBytes = 32;

constexpr u32 kSharedLimit = 232448;   // dynamic shared memory that a block may use on SM90, bytes
constexpr u32 kStagingBytes = 2048;   // of each math warp's staging patch: 16 rows of 128 bytes (epilogue/staging.cuh)

constexpr u32 kWarp = 32;
constexpr u32 kGroup = 128;   // threads of a warpgroup
constexpr u32 kGroupWarps = kGroup / kWarp;
constexpr u32 kMathGroups = 2, kMathWarps = kMathGroups * kGroupWarps;   // warpgroups 1 and 2
constexpr u32 kThreads = kGroup * (1 + kMathGroups);                     // without helpers
/// Whether a variant has warpgroups of helpers behind the math warpgroups, and with them a ring of packed k-blocks (expand/beside.cuh).
template <class C> constexpr bool kHasHelpers = C::Policy::kHelpers > 0;
/// Threads and warps of a thread block.
template <class C> constexpr u32 kBlockThreads = kThreads + C::Policy::kHelpers * kGroup;
template <class C> constexpr u32 kBlockWarps = kBlockThreads<C> / kWarp;
// Registers per thread after `setmaxnreg`.  The block is launched with all that an SM has, in eights: 168 per thread (128 with
// helpers), and what one warpgroup gives up another may take: 128 * 72 + 256 * 216 = 384 * 168; with helpers
// 128 * 64 + 256 * 200 + 128 * 48 = 512 * 128.  Where rows come from other ranks, dispatch needs more than 64, and helpers have 40.
template <class C> constexpr bool kLessToProduce = kHasHelpers<C> && C::kRanks == 1;
template <class C> constexpr u32 kProducerRegisters = kLessToProduce<C> ? 64 : 72;
template <class C> constexpr u32 kLaunchRegisters = (64 << 10) / kBlockThreads<C> / 8 * 8;
template <class C> constexpr u32 kMathRegisters = kHasHelpers<C> ? 200 : 216;
template <class C> constexpr u32 kHelperRegisters = kLessToProduce<C> ? 48 : 40;

// A pair is the number token * topk + slot, below 32768 * 32 = 2^20.  An origin is a pair with its rank in the bits above.
constexpr u32 kPairBits = 20, kPairMask = (1u << kPairBits) - 1;

/// Ids of the hardware's named barriers; 0 is __syncthreads.
enum Barrier : u32 {
    kBarrierTail = 1,   // publisher warp and the eight math warps, before and after the last meeting (roles/combine.cuh)
    kBarrierTurn = 2,   // and 3, one per math warpgroup: it has the turn (variants/pingpong.cuh)
    kBarrierMath = 4,   // the eight math warps, where they exchange results of a tile (operands swapped)
    kBarrierGroup = 5,   // and 6: the four warps of one math warpgroup, likewise
};

/// Where the inputs of a launch come from.
enum class Inputs : u32 {
    staged,   // from the buffer, where earlier work of the stream put them
    raw,      // from the caller's own tensors; the head of the launch stages them into the buffer
};

}   // namespace megamoe
