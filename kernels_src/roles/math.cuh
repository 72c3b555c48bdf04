// The two math warpgroups.
//
// cooperative: both take every tile; each multiplies 64 of its 128 rows with the same weights.
// pingpong:    they take tiles in turn.  While one is in its main loop the other is in its epilogue; the turn passes
//              when a main loop ends, by two hardware barriers (kBarrierTurn + group) on which one group waits and the
//              other arrives.  A group looks at its first stage only when it has the turn: by then the other has seen
//              all of its own, so no stage barrier can be a phase further than its parity can tell.
#pragma once
#include "epilogue/scatter.cuh"
#include "epilogue/swiglu_quant.cuh"
#include "pipe/tile_slots.cuh"

namespace megamoe {

struct Turn {
    MEGA_DEVICE static void take(u32 group) { ptx::named_sync(kBarrierTurn + group, kMathGroups * kGroup); }
    MEGA_DEVICE static void give(u32 group) { ptx::named_arrive(kBarrierTurn + (group ^ 1), kMathGroups * kGroup); }
};

template <class C> struct Math {
    static constexpr bool kPingpong = C::kVariant == Variant::pingpong;
    static constexpr u32 kStep = kPingpong ? kMathGroups : 1;
    static_assert(kTileSlots % kMathGroups == 0, "a tile slot must always belong to the same group");

    const Params& p;
    const Shared<C>& shared;
    u32 group;   // 0 or 1

    MEGA_DEVICE void epilogue(const TileView& tile, Result& result) const {
        const u32 warp = ptx::warp_id() % 4, first = (kPingpong ? 0 : group * 64) + warp * 16;
        if (tile.rows() <= first) return;
        const u32 rows = tile.rows() - first;   // valid ones from this warp's first on
        const Staging staging{shared.staging(group * 4 + warp), ptx::thread_id_again() % kWarp};
        if (tile.kind() == Tile::gemm2) Scatter<C>{p, staging, tile.row() + first, rows, tile.n()}.run(result);
        else SwigluQuant<C>{p, staging, tile.pool_row() + first, rows, tile.n()}.run(result);
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        const u32 row = kPingpong ? 0 : group * 64;
        u32 index = kPingpong ? group : 0;
        Result result;
        if (kPingpong && group == 1) Turn::give(group);   // group 0 begins
        while (true) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) {
                if (kPingpong && tile.owes_turn()) Turn::take(group);   // leaves the barrier as it was
                break;
            }
            MainLoop<C> loop(shared, tile.k_begin(), row);
            if (kPingpong) Turn::take(group);
            if (row < tile.rows()) loop.run(result, tile.k_blocks());
            else loop.skip(tile.k_blocks());
            if (kPingpong) Turn::give(group);
            epilogue(tile, result);
            done(slots, index);
            index += kStep;
        }
    }

    MEGA_DEVICE static void done(const TileSlots<C>& slots, u32 index) {
        __syncwarp();
        if (ptx::thread_id_again() % kWarp == 0) slots.stored(index), slots.release(index);
    }
};

}  // namespace megamoe
