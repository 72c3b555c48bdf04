// How many rows each local expert has and where they lie in the pools.  Pure index arithmetic: it also compiles with a
// plain C++17 compiler.
#pragma once
#include "base/constants.cuh"

namespace megamoe {

/// Tables in shared memory, built once per launch by dispatch/sort.cuh.
struct Plan {
    const u32* rows;      // [local experts]
    const u32* bases;     // [local experts + 1] first pool row / 128
    const u16* active;    // experts that have rows, in order
    u32 active_experts;
};

/// Which tile of which GEMM.  32 bytes, the payload of a tile slot.
struct Tile {
    enum Kind : u32 { gemm1 = 0, gemm2 = 1, stop = 2 };
    u32 kind;
    u32 expert;
    u32 n;          // which 256 columns
    u32 row;        // first pool row
    u32 rows;       // valid ones of the tile's BLOCK_M rows; the rest is padding
    u32 k_blocks;   // depth
    u32 k_begin;    // k-blocks this block of threads has streamed before this tile: every role derives stage and parity
                    // of the ring from it, and nobody has to follow tiles that are not its own
    u32 turn_left;  // of a stop tile: pingpong, this group has been given a turn that it has no tile for
};
static_assert(sizeof(Tile) == 32, "a tile slot has 32 bytes");

}  // namespace megamoe
