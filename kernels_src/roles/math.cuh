// What the two math warpgroups run, where activations are the rows of a product: for each tile the main loop, then the epilogue.  Which
// tiles, and which rows of them, a warpgroup computes, and when it may begin its main loop, is the variant's policy (variants/).
#pragma once
#include "epilogue/scatter.cuh"
#include "epilogue/swiglu_quant.cuh"
#include "pipe/tile_slots.cuh"

namespace megamoe {

template <class C, class Loop = MainLoop<C>> struct Math {
    using Policy = typename C::Policy;
    static constexpr u32 kStep = kTileReaders<C>;
    static_assert(kTileSlots % kMathGroups == 0, "a tile slot must always belong to the same group");

    const Params& p;
    const Shared<C>& shared;
    u32 group;   // 0 or 1

    MEGA_DEVICE void epilogue(const TileView& tile, Result& result) const {
        const u32 warp = ptx::warp_id() % 4, first = Policy::first_row(group) + warp * 16;
        if (tile.rows() <= first) return;
        const u32 rows = tile.rows() - first;   // valid rows from this warp's first on
        const Staging staging{shared.staging(group * 4 + warp), ptx::thread_id_again() % kWarp};
        if (tile.kind() == Tile::gemm2)
            Scatter<C>{p, staging, tile.row() + first, rows, tile.n()}.run(result);
        else SwigluQuant<C>{p, staging, tile.pool_row() + first, rows, tile.n()}.run(result);
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        const u32 row = Policy::first_row(group);
        u32 index = Policy::first_tile(group);
        Result result;
        Policy::start(group);
        while (true) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) {
                Policy::finish(tile, group);
                break;
            }
            Loop loop(shared, tile.k_begin(), row);
            Policy::take_turn(group);
            if (row < tile.rows()) loop.run(result, tile.k_blocks());
            else loop.skip(tile.k_blocks());
            Policy::give_turn(group);
            epilogue(tile, result);
            slots.done(index);
            index += kStep;
        }
    }
};

}   // namespace megamoe
