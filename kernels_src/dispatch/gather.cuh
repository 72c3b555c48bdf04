// Dispatch: copies each routed row and its scales from the rank that holds the token into the pool of GEMM 1, ordered by expert,
// writes down its origin for scatter, and counts it as arrived.
//
// The unit of work is an item: up to 1 << `item_shift` (1 to 8, as the host chooses) consecutive rows of one expert.  In the head
// of the launch, when no warp has anything else to do, each warp copies one row through registers (`first_round`); that is what the
// first tiles need.  While the matrix work runs, one warp of each block goes on with the rest (`dispatch_rest`, dispatch/pull.cuh):
// chunk by chunk through the dispatch slots in shared memory, by bulk copies, which need hardly any registers.  With one rank that is
// `rest` below, with several it is `Pull`.  Items come in the order in which tiles need them.
//
//   dispatched[slot]   arrivals: 1, of lane 0, plus the bytes of the chunk     waited for by the dispatch warp, which then stores it
//
// Ordering: rows are written here and read by TMA in other blocks.  Every lane puts its ordinary stores before the async proxy
// (proxy fence), lane 0 waits for its bulk stores; after a `__syncwarp` lane 0 releases act1_ready.  The reader acquires it and has a
// proxy fence of its own (LoadActivations::wait_rows).
#pragma once
#include "comm/timeline.cuh"
#include "dispatch/pairs.cuh"
#include "dispatch/places.cuh"
#include "dispatch/scales.cuh"
#include "layout/shared.cuh"
#include "pipe/pool_ring.cuh"
#include "pipe/ring.cuh"
#include "sched/order.cuh"

namespace megamoe {

template <class C> struct Gather {
    const Params& p;
    const Shared<C>& shared;
    const ExpertTable table;
    const u32 items, first_items;   // all items; those of `first_round`

    MEGA_DEVICE Gather(const Params& p_, const Shared<C>& shared_, const ExpertTable& table_)
        : p(p_), shared(shared_), table(table_), items(table_.items[table_.experts]),
          first_items(items_at_head()) {}

    MEGA_DEVICE u32 item_rows() const { return 1u << p.item_shift; }

    /// How many items need not wait for room in the pool: all, or if it is a ring those of the experts that fit into it whole.
    MEGA_DEVICE u32 items_in_pool() const {
        const u32 blocks = p.pool_rows / kPoolAlign;
        return table.blocks() <= blocks ? items : table.items[table.expert_at(blocks)];
    }

    /// How many items the head copies, a row for each warp.  With several ranks no more than the blocks' first tiles need, rounded up
    /// to pool blocks: NVLink has a tenth of the memory's bandwidth, and rows that nobody waits for yet would hold up those that all
    /// blocks wait for.
    MEGA_DEVICE u32 items_at_head() const {
        const u32 most = min_u32(items_in_pool(), kBlockWarps<C> * gridDim.x >> p.item_shift);
        const u32 blocks = ceil_div(gridDim.x, TileOrder<C>::kTilesN1);
        if (C::kRanks == 1 || blocks >= table.blocks()) return most;
        const u32 e = table.expert_at(blocks),
                  item = table.items[e] + ((blocks - table.bases[e]) * kPoolAlign >> p.item_shift);
        return min_u32(most, min_u32(item, table.items[e + 1]));
    }

    /// An item: its first row, where that lies in the pool, how many rows; in lane r < rows the origin of row r.
    struct Item {
        u32 first_row, pool_row, rows, origin;
    };

    /// Where a row is copied from: `from` is its origin, or kHere + its place in the pool (dispatch/places.cuh).
    MEGA_DEVICE const u8* row_address(u32 from) const {
        if (kKeepsPlaces<C> && from >= Places<C>::kHere)
            return p.act1_pool + u64(from - Places<C>::kHere) * C::kHidden;
        const u32 token = (from & kPairMask) / C::kTopK;
        return symmetric<const u8>(p, from >> kPairBits, p.x) + u64(token) * C::kHidden;
    }
    MEGA_DEVICE const float* row_scales(u32 from) const {
        const u32 token = (from & kPairMask) / C::kTopK;
        return symmetric<const float>(p, from >> kPairBits, p.x_scales) +
               u64(token) * (C::kHidden / kQuantBlock);
    }

    /// One row and its scales, by a whole warp.
    MEGA_DEVICE void copy_row(u32 from, u32 to) const {
        // vectors of a lane; of another rank's row all of them, if registers allow it: beside helpers there are fewer, and a loop or
        // a remainder takes some, so a row of 7168 is copied in halves
        constexpr u32 kVectors = C::kHidden / 16, kWhole = ceil_div(kVectors, kWarp),
                      kLong = kWhole == 14 ? 7 : 6,
                      kBesideHelpers = kVectors % kWarp == 0 ? (kWhole <= 12 ? 12 : kLong) : 6,
                      kMost = kHasHelpers<C> ? kBesideHelpers : 16,
                      kInFlight = C::kRanks == 1 ? 4 : min_u32(kMost, kWhole);
        const u32 lane = ptx::lane_id();
        RowScales<C> scales(row_scales(from));
        const u8* source = row_address(from);
        u8* target = p.act1_pool + u64(to) * C::kHidden;
        for (u32 c = lane; c < kVectors; c += kWarp * kInFlight) {
            Vec16 v[kInFlight];
#pragma unroll
            for (u32 i = 0; i < kInFlight; ++i)
                if (c + i * kWarp < kVectors) v[i] = ptx::load16(source + (c + i * kWarp) * 16);
#pragma unroll
            for (u32 i = 0; i < kInFlight; ++i)
                if (c + i * kWarp < kVectors) ptx::store16(target + (c + i * kWarp) * 16, v[i]);
        }
        scales.store(p, to);
    }

    /// Scales of an item's rows, from [token][k-block] to [k-block][row]: eight rows side by side fill a 32-byte sector.
    MEGA_DEVICE void copy_scales(const Item& item) const {
        constexpr u32 kBlocks = C::kHidden / kQuantBlock;
        const u32 row = ptx::lane_id() % item_rows(), step = kWarp >> p.item_shift;
        const float* source = row_scales(__shfl_sync(~0u, item.origin, row));
        if (row < item.rows)
            for (u32 b = ptx::lane_id() >> p.item_shift; b < kBlocks; b += step)
                p.act1_scales[u64(b) * p.pool_rows + item.pool_row + row] = ptx::load_l2(source + b);
    }

    /// Looks up item `i`, by a whole warp; or with kOneRow its row `offset` alone, in lane 0, with `rows` 0 if there is no such row.
    /// A whole item of one rank has waited for room in the pool when this returns.  Writes down the origins for scatter, except of
    /// whole items of several ranks, which `Pull` looks up ahead: it waits and writes when their turn has come.
    template <bool kOneRow> MEGA_DEVICE Item find(u32 i, u32 offset = 0) const {
        const u32 e = table.expert_in(table.items, i),
                  local = ((i - table.items[e]) << p.item_shift) + offset;
        const u32 first_row = table.bases[e] * kPoolAlign + local,
                  pool_row = first_row % p.pool_rows;
        if (kOneRow && local >= table.rows[e]) return {first_row, pool_row, 0, 0};
        const u32 rows = kOneRow ? 1 : min_u32(item_rows(), table.rows[e] - local),
                  lane = ptx::lane_id();
        constexpr bool kAhead = C::kRanks > 1 && !kOneRow;
        if (!kOneRow && !kAhead) wait_room(first_row);
        u32 from = 0;
        if (C::kRanks > 1 || lane < rows) {
            from = PairLists<C>{p}.template origin<kAhead ? 1 : C::kRanks>(
                e, lane < rows ? local + lane : PairLists<C>::kNoRow);
            if (!kAhead && lane < rows) p.row_pairs[first_row + lane] = from;
        }
        return {first_row, pool_row, rows, from};
    }
    /// Waits until the item that begins at `first_row` may be written: if the pools are rings, until GEMM 1 has read the pool block that
    /// was there a lap before.
    MEGA_DEVICE void wait_room(u32 first_row) const {
        if (first_row < p.pool_rows) return;
        wait_block(p, table, Wait::pool_read, p.act2_ready, TileOrder<C>::kTilesN1,
                   first_row - p.pool_rows);
        ptx::fence_async_global();   // GEMM 1 read it by TMA
    }
    /// Counts the item's rows as arrived; every lane has stored its part, lane 0 has waited for its bulk stores.
    MEGA_DEVICE void end(const Item& item) const {
        ptx::fence_async_global();
        __syncwarp();
        if (ptx::lane_id() == 0)
            ptx::add_release(p.act1_ready + item.first_row / kCounterRows, item.rows);
    }

    /// In all warps of all blocks: each copies a row.  Warps are counted from the last one back, so that the load warps, which have
    /// other work next, are left out first.
    MEGA_DEVICE void first_round() const {
        const u32 i = (kBlockWarps<C> - 1 - ptx::warp_id()) * gridDim.x + blockIdx.x,
                  item = i >> p.item_shift;
        if (item >= first_items) return;
        const Item row = find<true>(item, i % item_rows());
        if (row.rows == 0) return;
        copy_row(__shfl_sync(~0u, row.origin, 0), row.pool_row);
        end(row);
    }

    /// The rest with one rank, by one warp: items `index`, `index` + `step` ... after those of the head.
    MEGA_DEVICE void rest(u32 index, u32 step) const {
        Timeline<C> timeline(p, Role::dispatch);
        u32 chunks = 0;   // that this warp has copied so far: says slot and parity of the next
        for (u32 i = first_items + index; i < items; i += step) {
            const Item item = find<false>(i);
            copy_scales(item);
            copy_rows(item, chunks);
            end(item);
        }
        if (ptx::lane_id() == 0) timeline.done(Span::gather);
    }

    // of a row; the last may be shorter
    static constexpr u32 kChunks = ceil_div(C::kHidden, kDispatchChunk);
    MEGA_DEVICE static u32 chunk_bytes(u32 c) {
        return min_u32(kDispatchChunk, C::kHidden - c % kChunks * kDispatchChunk);
    }

    /// Copies an item's rows with a few chunks in flight (one, where there are only two slots); all lanes run along, lane 0 issues.
    /// Chunk c of all that this warp has copied passes through slot c % kSlots: in step c its load is issued, in step c + kLead its
    /// store.  With four slots (kLead = 2):
    ///   step    0    1    2       3       4           5
    ///   load    0    1    2       3       4 (slot 0)  5 (slot 1)
    ///   store             0       1       2           3
    /// So before load 4 store 0 must have read its slot, while store 1, the last one issued, may still be reading its own.
    MEGA_DEVICE void copy_rows(const Item& item, u32& sequence) const {
        // a load is issued this many steps before its store
        constexpr u32 kSlots = C::kDispatchSlots, kLead = kSlots - 2;
        const u32 total = item.rows * kChunks;
        const bool one = ptx::lane_id() == 0;
#pragma unroll 1
        for (u32 load = 0; load < total + kLead; ++load) {
            const u32 from = __shfl_sync(~0u, item.origin, load / kChunks % kWarp);
            if (one && load < total) {
                const u32 slot = (sequence + load) % kSlots;
                ptx::bulk_wait_read<1>();
                ptx::mbarrier_expect(shared.dispatched(slot), chunk_bytes(load));
                ptx::bulk_load(shared.dispatch_slot(slot),
                               row_address(from) + load % kChunks * kDispatchChunk,
                               chunk_bytes(load), shared.dispatched(slot));
                ptx::mbarrier_arrive(shared.dispatched(slot));
            }
            const u32 store = load - kLead;
            if (store >= total) continue;   // none yet: the difference has wrapped below zero
            const Ring<kSlots> at(sequence + store);
            wait_barrier(p, Wait::row_loaded, shared.dispatched(at.stage), at.parity,
                         item.first_row);
            if (!one) continue;
            u8* to = p.act1_pool + u64(item.pool_row + store / kChunks) * C::kHidden +
                     store % kChunks * kDispatchChunk;
            ptx::bulk_store(to, shared.dispatch_slot(at.stage), chunk_bytes(store));
        }
        sequence += total;
        if (one) ptx::bulk_wait_all();
    }
};

}   // namespace megamoe
