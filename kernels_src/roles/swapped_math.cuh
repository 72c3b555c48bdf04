// The two math warpgroups with operands swapped.  Both take every tile, each half of its weight rows, by as many columns as
// its valid rows need.
#pragma once
#include "epilogue/swapped_quant.cuh"
#include "epilogue/swapped_scatter.cuh"
#include "mma/one_by_one.cuh"
#include "roles/math.cuh"

namespace megamoe {

/// The main loop for so many columns.
template <class C, u32 kN, bool kMany = (kN > 64)> struct LoopFor {
    using Loop = SwappedLoop<C, kN>;
};
template <class C, u32 kN> struct LoopFor<C, kN, true> {
    using Loop = OneByOneLoop<C, kN>;
};

template <class C> struct SwappedMath {
    const Params& p;
    const Shared<C>& shared;
    u32 group;   // 0 or 1

    /// Columns from kFirst on, as many at a time as lanes share evenly and there is room for.
    template <u32 kFirst, u32 kN>
    MEGA_DEVICE void quantise(const TileView& tile, u32 thread, Columns<kN>& result) const {
        constexpr u32 kLeft = kN - kFirst, kCount = kLeft == 96 || kLeft < 64 ? kLeft : 64;
        SwappedQuant<C, kN, kFirst, kCount>{p,
                                            shared.staging(0),
                                            group * kGroup + thread,
                                            tile.pool_row() + kFirst,
                                            tile.rows() - kFirst,
                                            tile.n()}
            .run(result);
        if constexpr (kCount < kLeft) quantise<kFirst + kCount>(tile, thread, result);
    }

    template <u32 kN> MEGA_DEVICE void compute(const TileView& tile) const {
        const u32 thread = ptx::thread_id_again() % kGroup;
        const bool second = tile.kind() == Tile::gemm2;
        const bool half = C::kHidden % kBlockN != 0 && second &&
                          tile.n() == TileOrder<C>::kTilesN2 - 1;
        Columns<kN> result;
        typename LoopFor<C, kN>::Loop{shared, group, thread, half}.run(result, tile.k_begin(),
                                                                       tile.k_blocks());
        // nobody reads the staging of the tile before any more
        ptx::named_sync(kBarrierMath, kMathGroups * kGroup);
        if (second)
            SwappedScatter<C, kN>{
                p,   shared.staging(group * 4), group, thread, tile.row(), tile.rows(), tile.n(),
                half}
                .run(result);
        else quantise<0>(tile, thread, result);
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        for (u32 index = 0;; ++index) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) break;
            const u32 rows = tile.rows();
            if (C::kBlockM == 64 && rows <= 8) compute<8>(tile);
            else if (C::kBlockM == 64 && rows <= 16) compute<16>(tile);
            else if (rows <= 32) compute<32>(tile);
            else if (C::kBlockM == 64 || rows <= 64) compute<64>(tile);
            else if constexpr (C::kBlockM > 64) {
                if (rows <= 80) compute<80>(tile);
                else if (rows <= 96) compute<96>(tile);
                else compute<128>(tile);
            }
            Math<C>::done(slots, index);
        }
    }
};

}   // namespace megamoe
