// Dispatch of the rows that are left after the head, by one warp of each block (warp 2) while the matrix work runs.
//
// With several ranks most of these rows come over NVLink, where an answer takes a microsecond or two.  So everything is requested
// ahead: loads of an item's rows and scales begin while the item before it is stored, and the item after that is looked up meanwhile.
// One iteration of `run`, where rows go through the dispatch slots as in dispatch/gather.cuh:
//
//   step        item i (`now`)                     item i + 1 (`next`)              item i + 2 (`after`)
//   1           waits for room in the pool         rows begin to be loaded
//               scales, origins are stored         scales are requested
//               row places are looked up
//   2           rows are stored                    rows are loaded as slots allow
//   3                                                                               is looked up: where its rows come from
//   4           is counted as arrived, row places are recorded
//
// The first two iterations have no item i yet: they look up and request what the next two store, and skip the fences.
//
// Row places: where rows lie that came for another expert before (dispatch/places.cuh).
#pragma once
#include "dispatch/gather.cuh"
#include "dispatch/scales.cuh"

namespace megamoe {

template <class C> struct Pull {
    using Item = typename Gather<C>::Item;
    static constexpr u32 kSlots = C::kDispatchSlots, kChunks = Gather<C>::kChunks;

    const Params& p;
    const Shared<C>& shared;
    const Gather<C> gather;
    // the item whose rows are stored, and the one after it; without rows: none yet, or none left
    Item now = {}, next = {};
    // chunks of all items whose loads and whose stores have been issued; chunks up to the end of `now`
    u32 loaded = 0, stored = 0, end = 0;
    // at most so many chunks: with large items two keep pace with the matrix work, and more would take NVLink from its results
    const u32 in_flight;

    MEGA_DEVICE explicit Pull(const Gather<C>& gather_)
        : p(gather_.p), shared(gather_.shared), gather(gather_),
          in_flight(p.item_shift > 1 ? min_u32(2, kSlots - 1) : kSlots - 1) {}

    /// Item `i`; one without rows if there is no such item.
    MEGA_DEVICE Item find(u32 i) const {
        return i < gather.items ? gather.template find<false>(i) : Item{};
    }
    MEGA_DEVICE void request_scales(Scales<C>& scales, const Item& item) const {
        const u32 row = ptx::lane_id() % gather.item_rows(),
                  from = __shfl_sync(~0u, item.origin, row);
        scales.request(row < item.rows ? gather.row_scales(from) : nullptr);
    }
    /// From here on rows of `now` that have come for another expert are copied from there: replaces their origins by places.
    MEGA_DEVICE void look_up_places() {
        if (now.rows == 0) return;
        if (ptx::lane_id() < now.rows) now.origin = Places<C>(p, gather.table).look_up(now.origin);
        __syncwarp();
        ptx::fence_async_global();   // bulk stores of other blocks, acquired by lanes of this warp, before lane 0's bulk loads
    }
    /// Writes down the origins of the rows of `now`, for scatter.
    MEGA_DEVICE void store_origins() const {
        if (ptx::lane_id() < now.rows) p.row_pairs[now.first_row + ptx::lane_id()] = now.origin;
    }
    /// Issues loads of `now`, then of `next`, while fewer than `in_flight` chunks are under way.  Chunk c goes into the slot of chunk
    /// c - kSlots, whose store must have read it; it is not the last one issued, as in_flight < kSlots, and that may still be reading.
    MEGA_DEVICE void load() {
        const u32 most = min_u32(end + next.rows * kChunks, stored + in_flight);
#pragma unroll 1
        for (; loaded < most; ++loaded) {
            const bool ahead = loaded >= end;
            const u32 chunk = ahead ? loaded - end : loaded - (end - now.rows * kChunks);
            const u32 from = __shfl_sync(~0u, ahead ? next.origin : now.origin, chunk / kChunks);
            if (ptx::lane_id() != 0) continue;
            const u32 slot = loaded % kSlots, bytes = Gather<C>::chunk_bytes(chunk);
            ptx::bulk_wait_read<1>();
            ptx::mbarrier_expect(shared.dispatched(slot), bytes);
            ptx::bulk_load(shared.dispatch_slot(slot),
                           gather.row_address(from) + chunk % kChunks * kDispatchChunk, bytes,
                           shared.dispatched(slot));
            ptx::mbarrier_arrive(shared.dispatched(slot));
        }
    }
    /// Stores the rows of `now`, each chunk as soon as it has come, and issues loads as slots become free.
    MEGA_DEVICE void store() {
#pragma unroll 1
        for (u32 chunk = 0; stored < end; ++chunk) {
            const Ring<kSlots> at(stored);
            wait_barrier(p, Wait::row_loaded, shared.dispatched(at.stage), at.parity, now.first_row);
            u8* to = p.act1_pool + u64(now.pool_row + chunk / kChunks) * C::kHidden +
                     chunk % kChunks * kDispatchChunk;
            if (ptx::lane_id() == 0)
                ptx::bulk_store(to, shared.dispatch_slot(at.stage), Gather<C>::chunk_bytes(chunk));
            ++stored;
            load();
        }
    }

    /// Counts the rows of `now` as arrived and records their places; lane 0 has waited for their bulk stores.  One fence serves both:
    /// the counter and the places are relaxed after it.
    MEGA_DEVICE void end_now() const {
        if (now.rows == 0) return;
        if constexpr (!kKeepsPlaces<C>) {
            gather.end(now);
        } else {
            ptx::fence_async_global();
            __syncwarp();
            ptx::fence_device();
            const u32 lane = ptx::lane_id();
            if (lane == 0) ptx::add_relaxed(p.act1_ready + now.first_row / kCounterRows, now.rows);
            if (lane < now.rows)
                Places<C>(p, gather.table)
                    .record(now.origin, now.first_row + lane, now.pool_row + lane);
        }
    }
    /// By one warp: items `index`, `index` + `step` ... after those of the head.
    MEGA_DEVICE void run(u32 index, u32 step) {
        Timeline<C> timeline(p, Role::dispatch);
        Scales<C> scales(p.item_shift);
#pragma unroll 1
        for (u32 i = gather.first_items + index; i < gather.items + 2 * step; i += step) {
            end += now.rows * kChunks;
            load();
            gather.wait_room(now.first_row);
            store_origins();
            scales.store(p, now.pool_row);
            request_scales(scales, next);
            if constexpr (kKeepsPlaces<C>) look_up_places();
            store();
            const Item after = find(i);
            if (ptx::lane_id() == 0) ptx::bulk_wait_all();
            end_now();
            now = next, next = after;
        }
        if (ptx::lane_id() == 0) timeline.done(Span::gather);
    }
};

/// In one warp of each block that takes part, after `Gather::first_round`; this block is number `index` of `step`.
template <class C>
MEGA_DEVICE void dispatch_rest(const Gather<C>& gather, u32 index, u32 step) {
    // rows of other ranks, or staged in this launch, were acquired by a thread of this block; bulk copies read them now
    if constexpr (C::kRanks > 1 || C::kInputs == Inputs::raw) ptx::fence_async_global();
    // with one rank it is cheap to find again what the head did, so nothing of it is kept meanwhile
    if constexpr (C::kRanks == 1)
        Gather<C>(gather.p, gather.shared, gather.table).rest(index, step);
    else Pull<C>(gather).run(index, step);
}

}   // namespace megamoe
