// The two load warps, of which one lane each does the work: the activations lane and the weights lane.  They fill the same stages and
// announce their bytes on the same mbarrier, but the weights lane does not wait for activations: weights depend on nothing (but, in
// prefill, on their expansion), so it runs ahead, by up to as many k-blocks as there are stages.
//
//   mbarrier       arrivals                                                         waited for by
//   full[stage]    2: activations lane, weights lane, plus their bytes              math warps
//   empty[stage]   a lane of every math warp that reads the stage (4 per warpgroup) both lanes
//
// The weights lane stores the four weight scales of the stage before it arrives.  With helpers it fills a ring of packed k-blocks
// instead, of as many places, which is emptied into the stages, so it runs ahead by up to twice as many k-blocks; and the helpers arrive
// on full[stage] in its place (expand/beside.cuh).
//
// The weights lane is also the scheduler: it draws a ticket ahead of each tile, and publishes the tile in a tile slot.
#pragma once
#include "comm/timeline.cuh"
#include "expand/ahead.cuh"
#include "expand/beside.cuh"
#include "pipe/pool_ring.cuh"
#include "pipe/tile_slots.cuh"
#include "sched/order.cuh"

namespace megamoe {

// rows of the boxes of Params::act1, act2 and of act1_small, act2_small
constexpr u32 kActBoxRows = 64, kSmallBoxRows = 16;

// a ticket is drawn this many k-blocks before the end of the tile before it
constexpr u32 kTicketLead = 3;

/// Where the weights lane puts k-blocks: into the stages, or with helpers into the ring of packed k-blocks, which has as many places.
template <class C, bool kIntoRing> struct WeightTarget {
    using Codes = typename C::Weights::template CodeStream<C>;
    MEGA_DEVICE static u32 full(const Shared<C>& s, u32 i) { return s.full(i); }
    MEGA_DEVICE static u32 empty(const Shared<C>& s, u32 i) { return s.empty(i); }
};
template <class C> struct WeightTarget<C, true> {
    using Codes = PackedStream<C>;
    MEGA_DEVICE static u32 full(const Shared<C>& s, u32 i) { return s.packed_full(i); }
    MEGA_DEVICE static u32 empty(const Shared<C>& s, u32 i) { return s.packed_empty(i); }
};

template <class C> struct LoadWeights {
    using Scales = typename C::Weights::template ScaleStream<C>;
    using Target = WeightTarget<C, kHasHelpers<C>>;
    using Codes = typename Target::Codes;

    const Params& p;
    const Shared<C>& shared;
    const ExpertTable table;
    const u32 side;

    MEGA_DEVICE u32 ticket() const {
        return ptx::fetch_add_relaxed(p.control + kControlTicket + side * kControlTicketStride, 1);
    }

    /// Loads a tile's weights, k-block after k-block (mma/code_stream.cuh).  Returns the next ticket: drawn a little before the end of the
    /// tile, to be there in time, but not earlier, so that blocks with nothing left to do draw first.
    MEGA_DEVICE u32 stream(const Tile& tile, Scales& scales) const {
        Codes codes(p, tile);
        const u32 draw = tile.k_blocks > kTicketLead ? tile.k_blocks - kTicketLead : 0;
        u32 next = 0;
        if constexpr (C::Policy::kExpands) Expansion<C>::wait(p, tile);
        Ring<C::kStages> ring(tile.k_begin);
        for (u32 k = 0; k < tile.k_blocks; ++k, codes.advance(), ring.advance()) {
            if (k == draw) next = ticket();
            wait_barrier(p, Wait::weight_stage_free, Target::empty(shared, ring.stage),
                         ring.parity ^ 1, ring.stage);
            const u32 full = Target::full(shared, ring.stage);
            scales.store(shared.weight_scales(ring.stage, ring.parity), k, k + 1 < tile.k_blocks);
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
        for (u32 stops = kTileReaders<C>; stops > 0;) {   // one for each party of math warps
            tile.rows = --stops;   // of two, the first has been given the turn
            slots.publish(index++, tile);
        }
    }
};

template <class C> struct LoadActivations {
    const Params& p;
    const Shared<C>& shared;
    const ExpertTable table;

    /// Waits until the tile's rows are in their pool, and for a tile of GEMM 1, if the pools are rings, until its results may be stored.
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
        ptx::fence_async_global();   // what was acquired was in part ordinary stores; TMA reads it
    }

    /// Loads a tile's activations and their scales.  Up to 48 rows come in boxes of 16 rows, more in boxes of 64 (behind the first in boxes
    /// of 16, if a stage has no room for another), as far as there are valid rows: padding is never written, so it would be read from
    /// memory and not from the L2, once for each tile.  Rows and scales of the stage that are not loaded are whatever was there before,
    /// maybe NaN.  That does no harm: a row of a product depends on no other row, and results of padding are not stored.
    MEGA_DEVICE void stream(const Tile& tile) const {
        const bool first = tile.kind == Tile::gemm1,
                   small = tile.rows <= kActBoxRows - kSmallBoxRows;
        const ptx::TensorMap* map = first ? (small ? &p.act1_small : &p.act1)
                                          : (small ? &p.act2_small : &p.act2);
        const float* scales = (first ? p.act1_scales : p.act2_scales) + tile.pool_row;
        static_assert(C::kBlockM % kSmallBoxRows == 0,
                      "the last box would reach into the next stage");
        constexpr bool kTails = C::kBlockM % kActBoxRows != 0;   // a large box, then small ones
        const u32 box = small ? kSmallBoxRows : kActBoxRows,
                  boxes = kTails && !small ? 1 : ceil_div(tile.rows, box),
                  tail = kTails && tile.rows > kActBoxRows
                             ? ceil_div(tile.rows - kActBoxRows, kSmallBoxRows) * kSmallBoxRows
                             : 0;
        const u32 scale_bytes = ceil_div(tile.rows, 4u) * 16;
        Ring<C::kStages> ring(tile.k_begin);
        for (u32 k = 0; k < tile.k_blocks; ++k, ring.advance(), scales += p.pool_rows) {
            wait_barrier(p, Wait::stage_free, shared.empty(ring.stage), ring.parity ^ 1, ring.stage);
            const u32 full = shared.full(ring.stage), at = shared.acts(ring.stage);
            ptx::mbarrier_expect(full, (boxes * box + tail) * kBlockK + scale_bytes);
            // there is always one box, and most often only one
            ptx::tma_load_2d(at, map, full, k * kBlockK, tile.pool_row);
#pragma unroll 1
            for (u32 i = 1; i < boxes; ++i)
                ptx::tma_load_2d(at + i * box * kBlockK, map, full, k * kBlockK,
                                 tile.pool_row + i * box);
#pragma unroll 1
            for (u32 row = kActBoxRows; row < kActBoxRows + tail; row += kSmallBoxRows)
                ptx::tma_load_2d(at + row * kBlockK, first ? &p.act1_small : &p.act2_small, full,
                                 k * kBlockK, tile.pool_row + row);
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
