// How many rows each local expert has and where they lie: the table that the head builds, and the tile that is made of it.  Pure
// index arithmetic: it also compiles with a plain C++17 compiler, for tests.
//
// Rows are numbered through all local experts, each expert's first at a multiple of 128.  Row r of the activations lies at row
// r % pool_rows of its pool: where a batch has more rows than the pools hold, they are rings.  With pool blocks of 128 rows and
// `ring` blocks in a pool, three rules then keep rows from being overwritten too early, and the launch from a deadlock:
//   dispatch writes pool block b    after GEMM 1 has finished pool block b - ring   (act2_ready of that block is complete)
//   GEMM 1 writes pool block b      after GEMM 2 has finished pool block b - ring   (act2_done of that block is complete)
//   the order of tiles              hands out GEMM 2 of pool block b - ring before GEMM 1 of pool block b: the second wait is for
//                                   an earlier sweep, the first for GEMM 1 of rows that were dispatched before
#pragma once
#include "base/constants.cuh"

namespace megamoe {

/// Whether the two sides of the L2, with so many thread blocks each, may each take half of the tiles (comm/sides.cuh).
MEGA_DEVICE u32 even_enough(u32 blocks0, u32 blocks1) {
    const u32 fewer = min_u32(blocks0, blocks1);
    return fewer > 0 && 4 * fewer >= blocks0 + blocks1;
}

/// Tables in shared memory, built once per launch by dispatch/sort.cuh.
struct ExpertTable {
    const u32* rows;   // [local experts]
    const u32* bases;   // [local experts + 1] pool block (first row / 128) that each begins at; the last: all pool blocks
    const u32* items;   // [local experts + 1] first dispatch item of each (dispatch/gather.cuh); the last: all items
    const u16* active;   // [active_experts] experts that have rows, in order
    u32 experts, active_experts;
    // 1: each side of the L2 takes every other column of tiles; 0: all take all
    u32 two_sides;

    MEGA_DEVICE u32 blocks() const { return bases[experts]; }   // pool blocks of all experts

    /// The last expert that begins at or before `at`, by `bases` or `items`.
    MEGA_DEVICE u32 expert_in(const u32* begins, u32 at) const {
        u32 low = 0, high = experts;   // begins[low] <= at < begins[high]
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            (begins[middle] <= at ? low : high) = middle;
        }
        return low;
    }
    /// The expert whose rows pool block `block` holds.
    MEGA_DEVICE u32 expert_at(u32 block) const { return expert_in(bases, block); }
    /// How many rows expert `e` has from row `row` on; 0 in its padding.
    MEGA_DEVICE u32 rows_from(u32 e, u32 row) const {
        const u32 local = row - bases[e] * kPoolAlign;
        return local < rows[e] ? rows[e] - local : 0;
    }
};

/// A tile: up to BLOCK_M rows of one expert by 256 columns of one GEMM.  32 bytes, the content of a tile slot.
struct Tile {
    enum Kind : u32 { gemm1 = 0, gemm2 = 1, stop = 2 };
    u32 kind;
    u32 expert;
    u32 n;     // which 256 columns
    u32 row;   // first row, as numbered through all experts
    // how many rows it has, all of them valid; what follows up to BLOCK_M is padding, or of the next tile (sched/order.cuh), and
    // must not count.  Of a stop tile: 1 if the warpgroup that reads it has been given a turn for which there is no tile
    // (variants/pingpong.cuh)
    u32 rows;
    u32 k_blocks;   // depth / 128
    // k-blocks that this thread block has streamed before this tile: every role derives stage and parity of the ring from
    // it (pipe/ring.cuh), so nobody has to follow tiles that are not its own
    u32 k_begin;
    u32 pool_row;   // where the first row lies in the pools
};
static_assert(sizeof(Tile) == kTileSlotBytes, "a tile is the content of a tile slot");

}   // namespace megamoe
