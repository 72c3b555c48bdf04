// The fixed order of all tiles; a block of threads takes the next one by an atomic ticket.
//
// A unit is up to 1024 rows of one expert.  Inside a unit m runs fastest, so that its activations and the weights of the
// blocks working on it stay in the L2 cache.  GEMM 2 of a unit comes once `lag` further tiles of GEMM 1 have been
// handed out after the unit's own: by then its inputs are finished, and they are still in L2.
//
// It comes earlier when the next unit of GEMM 1 would run into rows of the ring that GEMM 2 has not used yet.
//
// No deadlock: a tile waits only for tiles with smaller tickets, tickets are taken in order by resident blocks, and the
// smallest unfinished one waits for nothing but dispatch, which has its own warps.
//
// Pure index arithmetic: it also compiles with a plain C++17 compiler.
#pragma once
#include "sched/plan.cuh"

namespace megamoe {

/// Walks over the units of all experts that have rows.
template <class C> struct UnitCursor {
    u32 active = 0, first_block = 0;   // position in Plan::active; first m-block of the unit

    MEGA_DEVICE bool done(const Plan& plan) const { return active == plan.active_experts; }
    MEGA_DEVICE u32 expert(const Plan& plan) const { return plan.active[active]; }
    MEGA_DEVICE u32 blocks_left(const Plan& plan) const { return ceil_div(plan.rows[expert(plan)], C::kBlockM) - first_block; }
    MEGA_DEVICE u32 width(const Plan& plan) const { return min_u32(kUnitRows / C::kBlockM, blocks_left(plan)); }
    /// First and last block of 128 rows.
    MEGA_DEVICE u32 first(const Plan& plan) const { return plan.bases[expert(plan)] + first_block * C::kBlockM / kPoolAlign; }
    MEGA_DEVICE u32 last_block(const Plan& plan) const { return first(plan) + (width(plan) * C::kBlockM - 1) / kPoolAlign; }
    MEGA_DEVICE void advance(const Plan& plan) {
        first_block += kUnitRows / C::kBlockM;
        if (first_block >= ceil_div(plan.rows[expert(plan)], C::kBlockM)) ++active, first_block = 0;
    }
};

template <class C> struct TileOrder {
    static constexpr u32 kTilesN1 = 2 * C::kIntermediate / kBlockN, kTilesN2 = ceil_div(C::kHidden, kBlockN);

    const Plan& plan;
    const u32 lag, ring;             // GEMM 1 tiles; blocks of 128 rows in a pool
    UnitCursor<C> unit;              // of the current phase
    UnitCursor<C> next1, next2;      // next unit of GEMM 1 and of GEMM 2
    u32 issued1 = 0, passed1 = 0;    // GEMM 1 tiles in phases so far; in units whose GEMM 2 has come
    u32 first = 0, count = 0;        // tickets of the current phase
    u32 kind = Tile::gemm1;

    MEGA_DEVICE TileOrder(const Plan& plan_, u32 lag_, u32 pool_rows) : plan(plan_), lag(lag_), ring(pool_rows / kPoolAlign) {}

    /// Moves to the next phase (one unit of one GEMM); false when there is none.
    MEGA_DEVICE bool next_phase() {
        if (next2.done(plan)) return false;
        const u32 own1 = next2.width(plan) * kTilesN1;   // GEMM 1 tiles of the unit whose GEMM 2 is due
        const bool due = next1.done(plan) || issued1 >= passed1 + own1 + lag || next1.last_block(plan) >= next2.first(plan) + ring;
        first += count;
        if (due) {
            kind = Tile::gemm2, unit = next2, count = unit.width(plan) * kTilesN2;
            passed1 += own1;
            next2.advance(plan);
        } else {
            kind = Tile::gemm1, unit = next1, count = unit.width(plan) * kTilesN1;
            issued1 += count;
            next1.advance(plan);
        }
        return true;
    }

    /// The tile with this ticket; tickets must not decrease.
    MEGA_DEVICE Tile locate(u32 ticket) {
        Tile tile = {};
        while (ticket - first >= count)
            if (!next_phase()) {
                tile.kind = Tile::stop;
                return tile;
            }
        const u32 width = unit.width(plan), t = ticket - first;
        const u32 block = unit.first_block + t % width;
        tile.kind = kind;
        tile.expert = unit.expert(plan);
        tile.n = t / width;
        tile.row = plan.bases[tile.expert] * kPoolAlign + block * C::kBlockM;
        tile.pool_row = tile.row % (ring * kPoolAlign);
        tile.rows = min_u32(C::kBlockM, plan.rows[tile.expert] - block * C::kBlockM);
        tile.k_blocks = (kind == Tile::gemm1 ? C::kHidden : C::kIntermediate) / kBlockK;
        return tile;
    }
};

}  // namespace megamoe
