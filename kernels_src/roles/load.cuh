// The two load warps; one lane of each does the work.  They fill the same stages and announce their bytes on the same
// barrier, but the weights do not wait for the activations: they depend on nothing and run ahead.
//
//   full[stage]    arrived by  activations lane, weights lane (2), plus their bytes    waited for by  math warps
//                  (with helpers, by them instead of the weights lane, which fills a ring of packed weights: expand/beside.cuh)
//                  (the weights lane also stores the four weight scales before it arrives)
//   empty[stage]   arrived by  every math warp that reads the stage (4 of each group)   waited for by  both lanes
//
// The weights lane is also the scheduler: it draws tickets, one ahead, and publishes the tiles.
#pragma once
#include "comm/timeline.cuh"
#include "expand/ahead.cuh"
#include "expand/beside.cuh"
#include "pipe/pool_ring.cuh"
#include "pipe/tile_slots.cuh"
#include "sched/order.cuh"

namespace megamoe {

// of the boxes that Params::act1 and its kin describe
constexpr u32 kActBoxRows = 64, kSmallBoxRows = 16;

// a tile's ticket is drawn so many k-blocks before the end of the one before it
constexpr u32 kTicketLead = 3;

/// Where the weights lane puts k-blocks: into the stages, or into the ring of packed ones.
template <class C, bool kPacked> struct WeightTarget {
    using Codes = typename C::Weights::template CodeStream<C>;
    static constexpr u32 kDepth = C::kStages;
    MEGA_DEVICE static u32 full(const Shared<C>& s, u32 i) { return s.full(i); }
    MEGA_DEVICE static u32 empty(const Shared<C>& s, u32 i) { return s.empty(i); }
    MEGA_DEVICE static u32 scales(const Shared<C>& s, u32 i) { return s.weight_scales(i); }
};
template <class C> struct WeightTarget<C, true> {
    using Codes = PackedStream<C>;
    static constexpr u32 kDepth = C::Policy::kPacked;
    MEGA_DEVICE static u32 full(const Shared<C>& s, u32 i) { return s.packed_full(i); }
    MEGA_DEVICE static u32 empty(const Shared<C>& s, u32 i) { return s.packed_empty(i); }
    MEGA_DEVICE static u32 scales(const Shared<C>& s, u32 i) { return s.packed_scales(i); }
};

template <class C> struct LoadWeights {
    using Scales = typename C::Weights::template ScaleStream<C>;
    using Target = WeightTarget<C, (C::Policy::kPacked > 0)>;
    using Codes = typename Target::Codes;

    const Params& p;
    const Shared<C>& shared;
    const ExpertTable table;
    const u32 side;

    MEGA_DEVICE u32 ticket() const {
        return ptx::fetch_add_relaxed(p.control + kControlTicket + side * kControlTicketStride, 1);
    }

    /// Streams a tile's weights, which lie one k-block after the other, just as the stages hold them (formats/): so
    /// memory is read in runs as long as can be.  Returns the next ticket.  It is drawn a little before the end, to be there in
    /// time, but not earlier, so that blocks with nothing to do come first.
    MEGA_DEVICE u32 stream(const Tile& tile, Scales& scales) const {
        Codes codes(p, tile);
        const u32 draw = tile.k_blocks > kTicketLead ? tile.k_blocks - kTicketLead : 0;
        u32 next = 0;
        if constexpr (C::Policy::kExpands) Expansion<C>::wait(p, tile);
        Ring<Target::kDepth> ring(tile.k_begin);
        for (u32 k = 0; k < tile.k_blocks; ++k, codes.advance(), ring.advance()) {
            if (k == draw) next = ticket();
            wait_barrier(p, Wait::weight_stage_free, Target::empty(shared, ring.stage),
                         ring.parity ^ 1, ring.stage);
            const u32 full = Target::full(shared, ring.stage);
            scales.store(Target::scales(shared, ring.stage), k, k + 1 < tile.k_blocks);
            codes.load(shared, ring.stage, full);
            ptx::mbarrier_arrive(full);
        }
        return next;
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        TileOrder<C> order(table, p.lag_tiles, p.pool_rows, side);
        Scales scales;
        u32 index = 0, k_begin = 0;
        Tile tile;
        for (u32 next = ticket();; next = stream(tile, scales)) {
            tile = order.locate(next);
            if (tile.kind == Tile::stop) break;
            scales.start(p, tile);
            tile.k_begin = k_begin, k_begin += tile.k_blocks;
            slots.publish(index++, tile);
        }
#pragma unroll 1
        for (u32 stops = kTileReaders<C>; stops > 0;) {   // one for each
            tile.rows = --stops;                          // the first has the turn
            slots.publish(index++, tile);
        }
    }
};

template <class C> struct LoadActivations {
    const Params& p;
    const Shared<C>& shared;
    const ExpertTable table;

    /// Blocks until the tile's rows are in their pool, and there is room for what the tile makes of them.
    MEGA_DEVICE void wait_rows(const Tile& tile) const {
        const bool first = tile.kind == Tile::gemm1;
        for (u32 r = 0; r < tile.rows; r += kCounterRows) {
            const u32 counter = (tile.row + r) / kCounterRows;
            wait_counter(p, first ? Wait::rows_dispatched : Wait::gemm1_done,
                         (first ? p.act1_ready : p.act2_ready) + counter,
                         first ? min_u32(kCounterRows, tile.rows - r) : TileOrder<C>::kTilesN1,
                         counter);
        }
        if (first && tile.row >= p.pool_rows)
            wait_block(p, table, Wait::gemm2_done, p.act2_done, TileOrder<C>::kTilesN2,
                       tile.row - p.pool_rows);
        ptx::fence_async_global();   // the rows were written by ordinary stores; TMA reads them
    }

    /// Up to 48 rows come in small boxes (from 49 on they would cover the same 64): an expert's padding was never written, so
    /// it would have to be read from memory, once for each tile.  Rows and scales that are not loaded are whatever the stage
    /// held before, maybe NaN; a row of a product depends on no other row, and these are not stored.  A half with no rows is
    /// not read either.
    MEGA_DEVICE void stream(const Tile& tile) const {
        const bool first = tile.kind == Tile::gemm1,
                   small = tile.rows <= kActBoxRows - kSmallBoxRows;
        const ptx::TensorMap* map = first ? (small ? &p.act1_small : &p.act1)
                                          : (small ? &p.act2_small : &p.act2);
        const float* scales = (first ? p.act1_scales : p.act2_scales) + tile.pool_row;
        const u32 box = small ? kSmallBoxRows : kActBoxRows, boxes = ceil_div(tile.rows, box);
        const u32 scale_bytes = ceil_div(tile.rows, 4u) * 16;
        Ring<C::kStages> ring(tile.k_begin);
        for (u32 k = 0; k < tile.k_blocks; ++k, ring.advance(), scales += p.pool_rows) {
            wait_barrier(p, Wait::stage_free, shared.empty(ring.stage), ring.parity ^ 1, ring.stage);
            const u32 full = shared.full(ring.stage), at = shared.acts(ring.stage);
            ptx::mbarrier_expect(full, boxes * box * kBlockK + scale_bytes);
            // there is always one box, most often no other
            ptx::tma_load_2d(at, map, full, k * kBlockK, tile.pool_row);
#pragma unroll 1
            for (u32 i = 1; i < boxes; ++i)
                ptx::tma_load_2d(at + i * box * kBlockK, map, full, k * kBlockK,
                                 tile.pool_row + i * box);
            ptx::bulk_load(shared.act_scales(ring.stage), scales, scale_bytes, full);
            ptx::mbarrier_arrive(full);
        }
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        Timeline<C> timeline(p, Role::activations);
        for (u32 index = 0;; ++index) {
            const Tile tile = slots.read(index);
            if (tile.kind == Tile::stop) break;
            slots.release(index);
            timeline.start();
            wait_rows(tile);
            timeline.done(Span::wait_rows, tile.row);
            stream(tile);
            timeline.done(Span::stream_activations, tile.row);
        }
    }
};

}   // namespace megamoe
