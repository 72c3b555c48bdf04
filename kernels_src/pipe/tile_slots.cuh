// The ring of four slots through which the scheduler (the weights lane) tells the other warps of its block the next tile.
//
//   mbarrier      arrivals                                                            waited for by
//   tile_full     1: the scheduler                                                    all readers
//   tile_empty    activations lane, publisher lane, a lane of every math warp that    the scheduler
//                 computes the tile (4 per warpgroup), of every helper warp
//   tile_stored   a lane of every math warp that computes the tile, when its rows     publisher lane
//                 are stored
//
// A slot is written again only after all of its readers have released it, so no mbarrier gets more than a phase ahead of a waiter.
#pragma once
#include "comm/fault.cuh"
#include "layout/shared.cuh"
#include "pipe/arrivals.cuh"
#include "pipe/ring.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// A tile slot whose fields are read each time they are needed: the math warps have no registers to keep them in.
struct TileView {
    u32 address;

    MEGA_DEVICE u32 field(u32 offset) const { return ptx::load4_shared(address + offset); }
    MEGA_DEVICE u32 kind() const { return field(MEGA_OFFSET(Tile, kind)); }
    MEGA_DEVICE u32 expert() const { return field(MEGA_OFFSET(Tile, expert)); }
    MEGA_DEVICE u32 n() const { return field(MEGA_OFFSET(Tile, n)); }
    MEGA_DEVICE u32 row() const { return field(MEGA_OFFSET(Tile, row)); }
    MEGA_DEVICE u32 rows() const { return field(MEGA_OFFSET(Tile, rows)); }
    MEGA_DEVICE bool owes_turn() const { return rows() != 0; }   // of a stop tile
    MEGA_DEVICE u32 k_blocks() const { return field(MEGA_OFFSET(Tile, k_blocks)); }
    MEGA_DEVICE u32 k_begin() const { return field(MEGA_OFFSET(Tile, k_begin)); }
    MEGA_DEVICE u32 pool_row() const { return field(MEGA_OFFSET(Tile, pool_row)); }
};

/// Math warps that compute a tile together; helper warps; and into how many parties, which take tiles in turn, math warps are split.
template <class C> constexpr u32 kTileWarps = C::Policy::kTileGroups * kGroupWarps;
template <class C> constexpr u32 kHelperWarps = C::Policy::kHelpers * kGroupWarps;
template <class C> constexpr u32 kTileReaders = kMathGroups / C::Policy::kTileGroups;

template <class C> struct TileSlots {
    const Params& p;
    const Shared<C>& shared;

    /// The scheduler: publishes the `index`-th tile of this thread block.
    MEGA_DEVICE void publish(u32 index, const Tile& tile) const {
        const Ring<kTileSlots> at(index);
        wait_barrier(p, Wait::tile_slot_free, shared.tile_empty(at.stage), at.parity ^ 1, index);
        *reinterpret_cast<Tile*>(shared.tile_slot(at.stage)) = tile;
        ptx::mbarrier_arrive(shared.tile_full(at.stage));
    }
    /// Readers: waits for the `index`-th tile and copies it.
    MEGA_DEVICE Tile read(u32 index) const {
        const Ring<kTileSlots> at(index);
        wait_barrier(p, Wait::tile_published, shared.tile_full(at.stage), at.parity, index);
        return *reinterpret_cast<const Tile*>(shared.tile_slot(at.stage));
    }
    /// The same for math and helper warps, without a copy and a deadline.
    MEGA_DEVICE TileView watched(u32 index) const {
        const Ring<kTileSlots> at(index);
        wait_barrier_watched(shared.tile_full(at.stage), at.parity);
        return {shared.tile_slot_address(at.stage)};
    }
    /// One lane of each reading warp, after a `__syncwarp`: the slot may be written again.
    MEGA_DEVICE void release(u32 index) const {
        ptx::mbarrier_arrive(shared.tile_empty(index % kTileSlots));
    }
    /// All lanes of a math warp, when its part of the tile is stored; its view of the tile is not valid any more.
    MEGA_DEVICE void done(u32 index) const {
        __syncwarp();
        if (!arrives(ptx::thread_id_again())) return;
        ptx::mbarrier_arrive(shared.tile_stored(index % kTileSlots));
        release(index);
    }
};

}   // namespace megamoe
