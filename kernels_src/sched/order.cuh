// The fixed order of all tiles: which tile a ticket means.  The weights lane of each block draws tickets by an atomic and calls
// `TileOrder::locate`.
//
// A unit is about 1024 rows of one expert; a sweep is one GEMM of one unit; a column is the tiles of a sweep that have their 256
// columns n, and so their weights, in common.  Within a sweep m (rows) runs fastest, so that a unit's activations and the weights
// of the columns under way stay in the L2.  GEMM 2 of a unit is handed out once `lag` further tiles of GEMM 1 have been handed out
// after the unit's own: by then its inputs are finished, and still in the L2.  It comes earlier if the next unit of GEMM 1 would
// need rows of the ring that GEMM 2 has not read yet.
//
// The L2 has two halves.  An SM reads through the near one, so what SMs near both halves read is kept in both, and is copied
// across the link between them.  With two sides, each takes every other column, by tickets of its own: a weight is then read on one
// side only, and weights take up half as much of the L2.  Both sides walk over the same sweeps, so they stay together.  Where the
// number of columns is odd, the side that has one more alternates from unit to unit, for each GEMM separately, since their tiles
// differ in depth.
//
//   sweep       GEMM 1 of unit 0, 16 columns     GEMM 2 of unit 0, 3 columns     GEMM 1 of unit 1     GEMM 2 of unit 1
//   side 0      n = 0, 2, 4 ... 14               n = 0, 2                        n = 0, 2 ...         n = 1
//   side 1      n = 1, 3, 5 ... 15               n = 1                           n = 1, 3 ...         n = 0, 2
//
// No deadlock: a tile waits only for tiles of earlier sweeps; each side's tickets are taken in order by resident blocks, of which
// each side that has tiles has some (comm/sides.cuh); and the first unfinished sweep waits for nothing but dispatch, which has
// warps of its own and waits for earlier sweeps only.
//
// Pure index arithmetic: it also compiles with a plain C++17 compiler, for tests.
#pragma once
#include "sched/experts.cuh"

namespace megamoe {

/// Rows from one tile to the next, of an expert with so many.  No two tiles share a counter, and none lies in two pool blocks.  So
/// where BLOCK_M rows are no multiple of those of a counter, experts with more rows have tiles of as many as that has.
template <class C> MEGA_DEVICE constexpr u32 tile_step(u32 rows) {
    static_assert(C::kBlockM <= kPoolAlign, "a tile would lie in two pool blocks");
    return C::kBlockM % kCounterRows == 0 || rows <= C::kBlockM ? C::kBlockM : kCounterRows;
}

/// Walks over the units of all experts that have rows.
template <class C> struct UnitCursor {
    u32 active = 0;    // position in ExpertTable::active
    u32 row, rows;     // the unit's first row; rows of the expert from there on
    u32 width, most;   // tiles in the unit; in the largest unit of the expert

    MEGA_DEVICE explicit UnitCursor(const ExpertTable& table) { enter(table); }
    MEGA_DEVICE bool done(const ExpertTable& table) const { return active == table.active_experts; }
    /// First and last pool block (of 128 rows).
    MEGA_DEVICE u32 first() const { return row / kPoolAlign; }
    MEGA_DEVICE u32 last(const ExpertTable& table) const {
        return (row + width * step(table) - 1) / kPoolAlign;
    }
    /// Rows from a tile of the expert to the next one.
    MEGA_DEVICE u32 step(const ExpertTable& table) const {
        return tile_step<C>(table.rows[table.active[active]]);
    }

    /// Begins the expert's first unit.  Its units are about equal: a small rest would load all weights again for a tile or two.
    MEGA_DEVICE void enter(const ExpertTable& table) {
        if (done(table)) return;
        const u32 expert = table.active[active];
        row = table.bases[expert] * kPoolAlign, rows = table.rows[expert];
        const u32 units = (rows + kUnitRows / 2) / kUnitRows, blocks = ceil_div(rows, step(table));
        width = most = units > 1 ? ceil_div(blocks, units) : blocks;
    }
    MEGA_DEVICE void advance(const ExpertTable& table) {
        const u32 taken = width * step(table);
        if (taken < rows)
            row += taken, rows -= taken, width = min_u32(most, ceil_div(rows, step(table)));
        else ++active, enter(table);
    }
};

template <class C> struct TileOrder {
    static constexpr u32 kTilesN1 = 2 * C::kIntermediate / kBlockN,
                         kTilesN2 = ceil_div(C::kHidden, kBlockN);
    // the tiles of GEMM 2's last column, n == kTilesN2 - 1, have 128 weight rows instead of 256: half tiles
    static constexpr bool kHasHalf = C::kHidden % kBlockN != 0;

    const ExpertTable& table;
    const u32 lag, ring;          // tiles of GEMM 1; pool blocks in a pool
    UnitCursor<C> next1, next2;   // next unit of GEMM 1 and of GEMM 2
    // tiles of GEMM 1 in the sweeps so far, and in those whose GEMM 2 has come too; of both sides
    u32 issued1 = 0, passed1 = 0;
    // this side's tickets of the current sweep: the first, and how many
    u32 first = 0, count = 0;
    // this side's first column of the next unit, by GEMM: 0 or 1
    u32 skip1, skip2;
    u32 skipped = 0;   // the same for the current sweep; with one side always 0
    u32 kind = Tile::gemm1, expert = 0, row = 0, rows = 0, width = 0;

    MEGA_DEVICE TileOrder(const ExpertTable& table_, u32 lag_, u32 pool_rows, u32 side)
        : table(table_), lag(lag_), ring(pool_rows / kPoolAlign), next1(table_), next2(next1),
          skip1(side), skip2(side) {}

    /// Moves to the next sweep, in which this side may have no tile; false when there is none.
    MEGA_DEVICE bool next_sweep() {
        if (next2.done(table)) return false;
        const u32 own1 = next2.width * kTilesN1;   // GEMM 1 tiles of the unit whose GEMM 2 is next
        const bool due = next1.done(table) || issued1 >= passed1 + own1 + lag ||
                         next1.last(table) >= next2.first() + ring;
        UnitCursor<C> unit = due ? next2 : next1;
        kind = due ? Tile::gemm2 : Tile::gemm1;
        expert = table.active[unit.active], row = unit.row, rows = unit.rows, width = unit.width;
        unit.advance(table);
        // with one side all columns are this side's; with two, half of what is left from its first on, rounded up
        skipped = due ? skip2 : skip1;
        first += count, count = width * (((due ? kTilesN2 : kTilesN1) + table.two_sides - skipped) >>
                                         table.two_sides);
        if (due) next2 = unit, passed1 += own1, skip2 ^= kTilesN2 & table.two_sides;
        else next1 = unit, issued1 += width * kTilesN1, skip1 ^= kTilesN1 & table.two_sides;
        return true;
    }

    /// The tile with this ticket of this side, all but its `k_begin`; tickets must not decrease from call to call.
    MEGA_DEVICE Tile locate(u32 ticket) {
        Tile tile = {};
        while (ticket - first >= count)
            if (!next_sweep()) {
                tile.kind = Tile::stop;
                return tile;
            }
        const u32 step = tile_step<C>(table.rows[expert]), block = (ticket - first) % width * step;
        tile.kind = kind;
        tile.expert = expert;
        tile.n = ((ticket - first) / width << table.two_sides) + skipped;
        tile.row = row + block;
        tile.pool_row = tile.row % (ring * kPoolAlign);
        tile.rows = min_u32(step, rows - block);
        tile.k_blocks = (kind == Tile::gemm1 ? C::kHidden : C::kIntermediate) / kBlockK;
        return tile;
    }
};

}   // namespace megamoe
