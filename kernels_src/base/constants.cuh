// Numbers that every room agrees on.
#pragma once
#include "base/types.cuh"

namespace megamoe {

// one scale per row and 128 columns of activations; per 128x128 of weights
constexpr u32 kQuantBlock = 128;
// depth of a pipeline stage: one quantisation block, 128 bytes of FP8
constexpr u32 kBlockK = 128;
// columns of a tile; in GEMM 1 these are 128 gate and 128 up columns, by eights
constexpr u32 kBlockN = 256;
constexpr u32 kPoolAlign = 128;    // an expert's rows start at a multiple of this in the pools
constexpr u32 kCounterRows = 64;   // rows that share one readiness counter
// about so many rows of an expert are swept together, so that they stay in L2
constexpr u32 kUnitRows = 1024;
constexpr u32 kMaxRanks = 8;
constexpr u32 kSideWords = 5;          // a bit for each of 160 SMs
constexpr u32 kDispatchChunk = 2048;   // bytes that dispatch moves at a time
constexpr u32 kTileSlots = 4;          // depth of the ring in which the scheduler publishes tiles

constexpr u32 kSharedLimit = 232448;   // dynamic shared memory that a block may use on SM90, bytes
constexpr u32 kStagingBytes = 2048;    // of a math warp: 16 rows of 128 bytes

constexpr u32 kWarp = 32;
constexpr u32 kGroup = 128;                      // threads of a warpgroup
constexpr u32 kMathGroups = 2, kMathWarps = 8;   // warpgroups 1 and 2
constexpr u32 kThreads = kGroup * (1 + kMathGroups);
constexpr u32 kWarps = kThreads / kWarp;
constexpr u32 kProducerRegisters = 72, kMathRegisters = 216;   // 128 * 72 + 256 * 216 <= 384 * 168

// a (token, slot) pair needs 32768 * 32 values; the rank sits above them
constexpr u32 kPairBits = 20;

/// Ids of the hardware's named barriers; 0 is __syncthreads.  At the tail the publisher warp meets the eight math warps; those
/// meet each other, or one warpgroup of them, where they exchange results of a tile (epilogue/).
enum Barrier : u32 {
    kBarrierTail = 1,
    kBarrierTurn = 2,   // and 3
    kBarrierMath = 4,
    kBarrierGroup = 5,   // and 6
};

/// Where the inputs of a launch come from.
enum class Inputs : u32 {
    staged,   // from the buffer, where earlier work of the stream put them
    raw,      // from tensors of the caller; the head of the launch stages them
};

}   // namespace megamoe
