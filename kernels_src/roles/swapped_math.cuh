// The two math warpgroups with operands swapped.  Both take every tile, each half of its weight rows, by as many columns as
// its valid rows need.
#pragma once
#include "epilogue/swapped_quant.cuh"
#include "epilogue/swapped_scatter.cuh"
#include "roles/math.cuh"

namespace megamoe {

template <class C> struct SwappedMath {
    const Params& p;
    const Shared<C>& shared;
    u32 group;   // 0 or 1

    template <u32 kN> MEGA_DEVICE void compute(const TileView& tile) const {
        const u32 thread = ptx::thread_id_again() % kGroup;
        const bool second = tile.kind() == Tile::gemm2;
        const bool half = C::kHidden % kBlockN != 0 && second &&
                          tile.n() == TileOrder<C>::kTilesN2 - 1;
        Columns<kN> result;
        SwappedLoop<C, kN>{shared, group, thread, half}.run(result, tile.k_begin(), tile.k_blocks());
        // nobody reads the staging of the tile before any more
        ptx::named_sync(kBarrierMath, kMathGroups * kGroup);
        if (second)
            SwappedScatter<C, kN>{
                p,   shared.staging(group * 4), group, thread, tile.row(), tile.rows(), tile.n(),
                half}
                .run(result);
        else
            SwappedQuant<C, kN>{
                p,           shared.staging(0), group * kGroup + thread, tile.pool_row(),
                tile.rows(), tile.n()}
                .run(result);
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        for (u32 index = 0;; ++index) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) break;
            const u32 rows = tile.rows();
            if (rows <= 8) compute<8>(tile);
            else if (rows <= 16) compute<16>(tile);
            else if (rows <= 32) compute<32>(tile);
            else compute<64>(tile);
            Math<C>::done(slots, index);
        }
    }
};

}   // namespace megamoe
