// The two math warpgroups with operands swapped.  Both take every tile, each half of its weight rows, by as many columns as
// its valid rows need.
#pragma once
#include "epilogue/swapped_quant.cuh"
#include "epilogue/swapped_scatter.cuh"
#include "mma/one_by_one.cuh"
#include "pipe/tile_slots.cuh"
#include "sched/order.cuh"

namespace megamoe {

/// The main loop for so many columns.
template <class C, u32 kN, bool kMany = (kN > 64)> struct LoopFor {
    using Loop = SwappedLoop<C, kN>;
};
template <class C, u32 kN> struct LoopFor<C, kN, true> {
    using Loop = OneByOneLoop<C, kN>;
};

template <class C> struct SwappedMath {
    using Policy = typename C::Policy;

    const Params& p;
    const Shared<C>& shared;
    u32 group;   // 0 or 1

    /// Whether a loop after that of so many columns has kFew.  Results of wider ones take their scales at the end, so a tile's rows must
    /// tell which of them it had.
    MEGA_DEVICE static constexpr bool few_apart(u32 columns) {
        return columns >= Unit<C>::kFew ? columns == Unit<C>::kFew
                                        : few_apart(Policy::wider(columns));
    }

    /// What comes before the loops, once for all of them.
    struct Start {
        Ring<C::kStages> ring;                 // at the first stage, which is full
        Unit<C> unit;                          // of its weight scales
        typename C::Weights::Rows blocks[2];   // block 1 where both are loaded at once
        u32 place;                             // packed_place
        bool half;                             // the tile has 128 rows, and a warpgroup one block
    };
    /// By the narrowest loop, from that of kN columns on, that has one for each row of the tile.
    template <u32 kN>
    MEGA_DEVICE void multiply(Start& start, u32 rows, u32 k_blocks, Columns<C>& result) const {
        if constexpr (kN < C::kBlockM)
            if (rows > kN) return multiply<Policy::wider(kN)>(start, rows, k_blocks, result);
        typename LoopFor<C, kN>::Loop{shared, group, start.place, start.half}.run(
            result, start.ring, start.blocks, start.unit, k_blocks);
        // what only wider loops write would else count as alive through this one
#pragma unroll
        for (u32 i = kN / 2; i < C::kBlockM / 2; i += 4)
            ptx::write_zeros(result.block[0] + i), ptx::write_zeros(result.block[1] + i);
    }

    MEGA_DEVICE void compute(const TileView& tile) const {
        static_assert(few_apart(0), "rows do not tell whether scales are applied at the end");
        const u32 place = packed_place(ptx::thread_id_again() % kGroup);
        const bool second = tile.kind() == Tile::gemm2;
        const bool half = TileOrder<C>::kHasHalf && second && tile.n() == TileOrder<C>::kTilesN2 - 1;
        Columns<C> result;
        Start start{Ring<C::kStages>(tile.k_begin()), {}, {}, place, half};
        wait_barrier_watched(shared.full(start.ring.stage), start.ring.parity);
        start.unit.load(shared.weight_scales(start.ring.stage) + group * 8);
        const auto load = [&](u32 which) {
            start.blocks[which].load(shared.weights(start.ring.stage),
                                     shared.exponents(start.ring.stage),
                                     half ? group : group * 2 + which, place);
        };
        load(0);
        if constexpr (Policy::kColumnsAtOnce != 0)
            if (tile.rows() <= Policy::kColumnsAtOnce) load(1);
        multiply<Policy::wider(0)>(start, tile.rows(), tile.k_blocks(), result);
        if (tile.rows() > Unit<C>::kFew) start.unit.apply(result);
        // beside a large result there is no register to have kept this in
        const u32 of_both = ptx::thread_id_again() - kGroup, group = of_both / kGroup;
        // nobody reads the staging of the tile before any more
        ptx::named_sync(kBarrierMath, kMathGroups * kGroup);
        if (second)
            SwappedScatter<C>{p,          shared.staging(group * 4),
                              group,      of_both % kGroup,
                              tile.row(), tile.rows(),
                              tile.n(),   half}
                .run(result);
        else {
            const SwappedQuant<C> quant{p,           shared.staging(0), of_both, tile.pool_row(),
                                        tile.rows(), tile.n()};
            quant.run(result);
        }
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        for (u32 index = 0;; ++index) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) break;
            compute(tile);
            slots.done(index);
        }
    }
};

}   // namespace megamoe
