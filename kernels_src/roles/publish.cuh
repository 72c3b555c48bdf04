// The publisher, one lane of warp 3: tells other blocks that a tile is finished.  To make the math warps' stores visible to the whole
// GPU takes most of a microsecond; this way nobody who computes waits for it.  It also watches the math warps, whose waits have no
// deadline of their own: it waits with one for each of their tiles.
//
//   tile_stored[slot]   arrivals: each math warp of the tile, after its stores           waited for here
//   act2_ready[rows]    released here, once for each tile of GEMM 1 and 64 rows of it    acquired by the activations lane; where the
//                                                                                        pools are rings also by dispatch
//   act2_done[rows]     likewise for GEMM 2, where the pools are rings                   acquired by the activations lane
//
// The release is cumulative: what the math warps stored before they arrived is visible to whoever acquires the counter.
#pragma once
#include "comm/timeline.cuh"
#include "pipe/tile_slots.cuh"

namespace megamoe {

template <class C> MEGA_DEVICE void publish_tiles(const Params& p, const Shared<C>& shared,
                                                  const ExpertTable& table, Timeline<C>& timeline) {
    const bool ring = table.blocks() > p.pool_rows / kPoolAlign;
    const TileSlots<C> slots{p, shared};
    for (u32 index = 0;; ++index) {
        const Tile tile = slots.read(index);
        if (tile.kind == Tile::stop) break;
        timeline.start();
        const Ring<kTileSlots> at(index);
        const Wait what = tile.kind == Tile::gemm1 ? Wait::gemm1_tile_stored
                                                   : Wait::gemm2_tile_stored;
        wait_barrier(p, what, shared.tile_stored(at.stage), at.parity, index);
        u32* counters = tile.kind == Tile::gemm1 ? p.act2_ready : p.act2_done;
        if (tile.kind == Tile::gemm1 || ring)
            for (u32 r = 0; r < tile.rows; r += kCounterRows)
                ptx::add_release(counters + (tile.row + r) / kCounterRows, 1);
        timeline.done(tile.kind == Tile::gemm1 ? Span::gemm1 : Span::gemm2, tile.row);
        slots.release(index);
    }
}

}   // namespace megamoe
