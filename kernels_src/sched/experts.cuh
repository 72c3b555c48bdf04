// How many rows each local expert has and where they lie.  Pure index arithmetic: it also compiles with a plain C++17
// compiler.
//
// Rows are numbered through all experts.  Row r of the activations lies at row r % pool_rows of its pool: when a batch
// has more rows than the pools, they are rings.  Then, with blocks of 128 rows and a ring of that many blocks:
//   dispatch writes block b      after GEMM 1 has finished block b - ring   (act2_ready of that block is complete)
//   GEMM 1 writes block b        after GEMM 2 has finished block b - ring   (act2_done of that block is complete)
//   the order of tiles           hands out GEMM 2 of block b - ring before GEMM 1 of block b, so the second wait is for
//                                an earlier sweep; the first is for GEMM 1 of rows that were dispatched before.
#pragma once
#include "base/constants.cuh"

namespace megamoe {

/// Whether so many blocks on either side of the L2 may each take half of the tiles (comm/sides.cuh): a side without blocks
/// would leave its half undone, and one with few would be late.
MEGA_DEVICE u32 even_enough(u32 blocks0, u32 blocks1) {
    const u32 fewer = min_u32(blocks0, blocks1);
    return fewer > 0 && 4 * fewer >= blocks0 + blocks1;
}

/// Tables in shared memory, built once per launch by dispatch/sort.cuh.
struct ExpertTable {
    const u32* rows;     // [local experts]
    const u32* bases;    // [local experts + 1] first pool row / 128
    const u32* items;    // [local experts + 1] first item of dispatch (dispatch/gather.cuh)
    const u16* active;   // experts that have rows, in order
    u32 experts, active_experts;
    // 1: each side of the L2 takes every other column of tiles; 0: all take all
    u32 two_sides;

    MEGA_DEVICE u32 blocks() const { return bases[experts]; }   // of 128 rows, all experts'

    /// The last expert that begins at or before `at` in the table `begins`.
    MEGA_DEVICE u32 expert_in(const u32* begins, u32 at) const {
        u32 low = 0, high = experts;   // begins[low] <= at < begins[high]
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            (begins[middle] <= at ? low : high) = middle;
        }
        return low;
    }
    /// The expert that owns block `block`.
    MEGA_DEVICE u32 expert_at(u32 block) const { return expert_in(bases, block); }
    /// Rows of expert `e` from row `row` on; 0 in its padding.
    MEGA_DEVICE u32 rows_from(u32 e, u32 row) const {
        const u32 local = row - bases[e] * kPoolAlign;
        return local < rows[e] ? rows[e] - local : 0;
    }
};

/// Which tile of which GEMM.  32 bytes, the payload of a tile slot.
struct Tile {
    enum Kind : u32 { gemm1 = 0, gemm2 = 1, stop = 2 };
    u32 kind;
    u32 expert;
    u32 n;     // which 256 columns
    u32 row;   // first row
    // valid ones of the tile's BLOCK_M rows, the rest is padding; of a stop tile: 1 when the group
    // that reads it has been given a turn that it has no tile for (variants/pingpong.cuh)
    u32 rows;
    u32 k_blocks;   // depth
    // k-blocks this block of threads has streamed before this tile: every role derives stage and
    // parity of the ring from it, and nobody has to follow tiles that are not its own
    u32 k_begin;
    u32 pool_row;   // where the first row lies in the pools
};
static_assert(sizeof(Tile) == 32, "a tile slot has 32 bytes");

}   // namespace megamoe
