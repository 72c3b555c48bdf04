// Where sorted pairs lie: in the memory of the rank whose experts they name.  Written by the sort (dispatch/sort.cuh), read by the
// expert table there and by dispatch.
//
// Each rank sorts its own (token, slot) pairs by expert and stores them, before the ranks meet, in the memory of the ranks that need
// them.  So every rank has from each source rank a list of the pairs that name its experts, and a table of where each expert's pairs
// begin in that list, and nobody reads another rank's tables: each look-up would be a trip over NVLink, one after the other.
//
//   expert_offsets   [source rank][local experts + 1], each source's table at a multiple of four words
//   sorted_pairs     [source rank][Params::most_pairs]   origins: source rank << 20 | token * topk + slot
//
// With one rank: expert_offsets [experts + 1], sorted_pairs [pairs].
#pragma once
#include "base/constants.cuh"
#include "layout/params.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// Writes this rank's pairs to all ranks, and reads those of all ranks that name its own experts.
template <class C> struct PairLists {
    // words from one source's table to the next
    static constexpr u32 kTable = ceil_div(C::kLocalExperts + 1, 4u) * 4;

    const Params& p;

    /// Where the pairs of expert `e` begin in the list for its rank; `begins[e]`: how many of this rank's pairs name an expert before e.
    MEGA_DEVICE static u32 begin_of(const u32* begins, u32 e) {
        return C::kRanks == 1 ? begins[e]
                              : begins[e] - begins[e / C::kLocalExperts * C::kLocalExperts];
    }
    /// Stores where the `pairs` pairs of expert `e` begin, at its rank; behind its rank's last expert where they end, too.
    MEGA_DEVICE void put_begin(u32 e, u32 begin, u32 pairs) const {
        if constexpr (C::kRanks == 1) {
            symmetric<u32>(p, p.rank, p.expert_offsets)[e] = begin;
        } else {
            const u32 to = e / C::kLocalExperts, local = e % C::kLocalExperts;
            const auto table = symmetric<u32>(p, to, p.expert_offsets);
            table[p.rank * kTable + local] = begin;
            if (local == C::kLocalExperts - 1) table[p.rank * kTable + local + 1] = begin + pairs;
        }
    }
    /// Stores a pair of expert `e` at position `at` of the list for its rank.  `own`: this rank's list, so that with one rank no address
    /// is looked up for each pair.
    template <class List> MEGA_DEVICE void put_pair(List own, u32 e, u32 at, u32 pair) const {
        if constexpr (C::kRanks == 1) own[at] = pair;
        else
            symmetric<u32>(p, e / C::kLocalExperts,
                           p.sorted_pairs)[p.rank * p.most_pairs + at] = p.rank << kPairBits | pair;
    }

    /// First pair of local expert `e` in the list from rank `source`; with e + 1, one past its last.
    MEGA_DEVICE u32 offset(u32 e, u32 source) const {
        if constexpr (C::kRanks == 1)
            return ptx::load_l2(symmetric<const u32>(p, source, p.expert_offsets) +
                                p.rank * C::kLocalExperts + e);
        else
            return ptx::load_l2(symmetric<const u32>(p, p.rank, p.expert_offsets) +
                                source * kTable + e);
    }
    MEGA_DEVICE u32 rows(u32 e, u32 source) const {
        return offset(e + 1, source) - offset(e, source);
    }

    // no row: `origin` returns 0
    static constexpr u32 kNoRow = ~0u;
    /// The origin of row `index` of local expert `e`, rank << 20 | pair.  With several ranks all lanes of a warp call it, each with an
    /// index of its own or kNoRow.  An expert's rows are those of the lists one after the other, beginning with the next rank's and
    /// ending with this rank's own, so that not all ranks pull from the same one at the same time.
    /// The loop over the lists is written out kUnroll times: whole where a row is waited for, not at all where other work is under way
    /// meanwhile and the size of the code counts.
    template <u32 kUnroll> MEGA_DEVICE u32 origin(u32 e, u32 index) const {
        if constexpr (C::kRanks == 1) {
            if (index == kNoRow) return 0;
            return ptx::load_l2(symmetric<const u32>(p, 0, p.sorted_pairs) + offset(e, 0) + index);
        } else {
            const bool wanted = index != kNoRow;
            const u32 lane = ptx::lane_id(), source = (p.rank + 1 + lane) % C::kRanks;
            u32 begin = 0, count = 0,
                at = 0;   // lane i has the i-th list: where the expert's pairs begin, how many
            if (lane < C::kRanks) begin = offset(e, source), count = offset(e + 1, source) - begin;
            const u32 list = source * p.most_pairs + begin;
#pragma unroll(kUnroll)
            for (u32 i = 0; i < C::kRanks; ++i) {
                const u32 its_count = __shfl_sync(~0u, count, i),
                          its_list = __shfl_sync(~0u, list, i);
                if (index < its_count) at = its_list + index;
                index -= its_count;   // once found it wraps below zero, and is larger than every count
            }
            return wanted ? ptx::load_l2(symmetric<const u32>(p, p.rank, p.sorted_pairs) + at) : 0;
        }
    }
};

}   // namespace megamoe
