// The sort, in the head of the launch: which pairs go to which expert.  A counting sort over blocks, called by kernels/megamoe.cuh:
//
//   1. blocks 0 .. sort_blocks-1 each count the experts in their slice of the rank's (token, slot) pairs
//   -- grid barrier 0 --
//   2. the same blocks add up the counts and store the pairs of their slice, ordered by expert, at the ranks that have the experts;
//      block 0 also stores where each expert's pairs begin (dispatch/pairs.cuh)
//   -- grid barrier 1, and with several ranks the meeting `inputs` --
//   3. every block builds its table of the local experts: rows, first pool block, which have any (sched/experts.cuh)
//
// Pairs with a masked slot (-1, or any id that is no expert) are left out here and appear nowhere later but in combine, which skips
// them.  The order of an expert's pairs within one slice is up to atomics; no result depends on it, since rows never mix.
#pragma once
#include "comm/sides.cuh"
#include "dispatch/pairs.cuh"
#include "dispatch/scan.cuh"
#include "layout/shared.cuh"
#include "sched/experts.cuh"
#include "stage/inputs.cuh"

namespace megamoe {

template <class C> struct Sort {
    static constexpr u32 kExperts = C::kExperts;

    const Params& p;
    u32 *counts, *begins, *cursors;   // [experts] each, in shared memory
    u32 slice_begin, slice_end;

    MEGA_DEVICE Sort(const Params& p_, u32* scratch)
        : p(p_), counts(scratch), begins(scratch + kExperts), cursors(scratch + 2 * kExperts) {
        const u32 pairs = p.tokens * C::kTopK, slice = ceil_div(pairs, p.sort_blocks);
        slice_begin = min_u32(pairs, blockIdx.x * slice);
        slice_end = min_u32(pairs, slice_begin + slice);
    }
    MEGA_DEVICE bool counting() const { return blockIdx.x < p.sort_blocks; }
    MEGA_DEVICE u32 expert_of(u32 pair) const {   // kExperts or more: masked
        const i64 id = input_id<C>(p, pair);
        return static_cast<u64>(id) < kExperts ? static_cast<u32>(id) : kExperts;
    }

    /// Step 1, by all threads of the block.
    MEGA_DEVICE void count() const {
        if (!counting()) return;
        for (u32 e = threadIdx.x; e < kExperts; e += kBlockThreads<C>) counts[e] = 0;
        __syncthreads();
        for (u32 i = slice_begin + threadIdx.x; i < slice_end; i += kBlockThreads<C>) {
            const u32 e = expert_of(i);
            if (e < kExperts) atomicAdd(&counts[e], 1u);
        }
        __syncthreads();
        for (u32 e = threadIdx.x; e < kExperts; e += kBlockThreads<C>)
            p.slice_counts[blockIdx.x * kExperts + e] = counts[e];
    }

    /// Step 2, by all threads of the block.
    MEGA_DEVICE void order() const {
        if (!counting()) return;
        for (u32 e = threadIdx.x; e < kExperts; e += kBlockThreads<C>) {
            u32 all = 0, before = 0;
            for (u32 b = 0; b < p.sort_blocks; ++b) {
                const u32 n = ptx::load_l2(p.slice_counts + b * kExperts + e);
                before += b < blockIdx.x ? n : 0;
                all += n;
            }
            counts[e] = all, cursors[e] = before;
        }
        __syncthreads();
        if (threadIdx.x < kWarp) {
            WarpScan scan;
#pragma unroll 1
            for (u32 e = threadIdx.x; e < ceil_div(kExperts, kWarp) * kWarp; e += kWarp) {
                const u32 begin = scan.exclusive(e < kExperts ? counts[e] : 0);
                if (e < kExperts) begins[e] = begin;
            }
            if (C::kRanks == 1 && blockIdx.x == 0 && threadIdx.x == 0)
                symmetric<u32>(p, p.rank, p.expert_offsets)[kExperts] = scan.total;
        }
        __syncthreads();
        const PairLists<C> lists{p};
        for (u32 e = threadIdx.x; e < kExperts; e += kBlockThreads<C>) {
            const u32 begin = PairLists<C>::begin_of(begins, e);
            cursors[e] += begin;
            if (blockIdx.x == 0) lists.put_begin(e, begin, counts[e]);
        }
        __syncthreads();
        const auto own = symmetric<u32>(p, p.rank, p.sorted_pairs);
        for (u32 i = slice_begin + threadIdx.x; i < slice_end; i += kBlockThreads<C>) {
            const u32 e = expert_of(i);
            if (e < kExperts) lists.put_pair(own, e, atomicAdd(&cursors[e], 1u), i);
        }
    }
};

/// Step 3, by one warp of each block: fills the tables in shared memory.  Also adds to the caller's statistics, in block 0.
template <class C> MEGA_DEVICE void build_expert_table(const Params& p, const Shared<C>& shared) {
    const PairLists<C> lists{p};
    const SideCounts blocks_of = counted_sides(p);
    const u32 two_sides = even_enough(blocks_of.of0, blocks_of.of1);
    WarpScan blocks, items, active;
#pragma unroll 1
    for (u32 e = ptx::lane_id(); e < ceil_div(C::kLocalExperts, kWarp) * kWarp; e += kWarp) {
        u32 rows = 0;
        if (e < C::kLocalExperts)
            for (u32 r = 0; r < C::kRanks; ++r) rows += lists.rows(e, r);
        const u32 base = blocks.exclusive(ceil_div(rows, kPoolAlign)),
                  at = active.exclusive(rows > 0);
        const u32 item = items.exclusive((rows + (1u << p.item_shift) - 1) >> p.item_shift);
        if (e < C::kLocalExperts) {
            shared.expert_rows()[e] = rows, shared.expert_bases()[e] = base,
            shared.expert_items()[e] = item;
            if (rows > 0) shared.active_experts()[at] = static_cast<u16>(e);
            // atomic, since launches of other buffers may add to the same statistics at the same time
            if (p.stats != nullptr && blockIdx.x == 0 && e < kLocalRouted<C>)
                atomicAdd(p.stats + e, static_cast<i32>(rows));
        }
    }
    if (ptx::lane_id() == 0) {
        shared.expert_bases()[C::kLocalExperts] = blocks.total,
        shared.expert_items()[C::kLocalExperts] = items.total;
        shared.active_count() = active.total, shared.two_sides() = two_sides;
    }
}

template <class C> MEGA_DEVICE ExpertTable expert_table_of(const Shared<C>& shared) {
    return {shared.expert_rows(),    shared.expert_bases(), shared.expert_items(),
            shared.active_experts(), C::kLocalExperts,      shared.active_count(),
            shared.two_sides()};
}

}   // namespace megamoe
