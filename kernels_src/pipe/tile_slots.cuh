// The ring of four slots through which the scheduler tells the other warps what to do.
//
//   tile_full    arrived by  the scheduler (weights warp), 1                  waited for by  all readers
//   tile_empty   arrived by  the activations warp, the publisher warp,        waited for by  the scheduler
//                            every math warp that computes the tile, 2 + 4 a group; helpers
//   tile_stored  arrived by  those math warps, when their rows are written     waited for by  the publisher
//
// A slot is used again only when all readers have let it go, so no barrier can run a phase ahead of its waiter.
#pragma once
#include "comm/fault.cuh"
#include "layout/shared.cuh"
#include "pipe/ring.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// A tile slot whose fields are read each time they are needed: registers are dear in the math warps.
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

/// Math warps that compute a tile together; and parties of them that take tiles in turn.
template <class C> constexpr u32 kTileWarps = C::Policy::kTileGroups * (kGroup / kWarp);
template <class C> constexpr u32 kHelperWarps = C::Policy::kHelpers * (kGroup / kWarp);
template <class C> constexpr u32 kTileReaders = kMathGroups / C::Policy::kTileGroups;

template <class C> struct TileSlots {
    const Params& p;
    const Shared<C>& shared;

    /// Scheduler: puts the `index`-th tile of this block of threads into its slot.
    MEGA_DEVICE void publish(u32 index, const Tile& tile) const {
        const Ring<kTileSlots> at(index);
        wait_barrier(p, Wait::tile_slot_free, shared.tile_empty(at.stage), at.parity ^ 1, index);
        *reinterpret_cast<Tile*>(shared.tile_slot(at.stage)) = tile;
        ptx::mbarrier_arrive(shared.tile_full(at.stage));
    }
    /// Readers: waits for the `index`-th tile.
    MEGA_DEVICE Tile read(u32 index) const {
        const Ring<kTileSlots> at(index);
        wait_barrier(p, Wait::tile_published, shared.tile_full(at.stage), at.parity, index);
        return *reinterpret_cast<const Tile*>(shared.tile_slot(at.stage));
    }
    /// The same for the math warps.
    MEGA_DEVICE TileView watched(u32 index) const {
        const Ring<kTileSlots> at(index);
        wait_barrier_watched(shared.tile_full(at.stage), at.parity);
        return {shared.tile_slot_address(at.stage)};
    }
    /// One lane of each reading warp: the slot may be written again.
    MEGA_DEVICE void release(u32 index) const {
        ptx::mbarrier_arrive(shared.tile_empty(index % kTileSlots));
    }

    /// One lane of each math warp: its part of the tile is written.
    MEGA_DEVICE void stored(u32 index) const {
        ptx::mbarrier_arrive(shared.tile_stored(index % kTileSlots));
    }
};

}   // namespace megamoe
