// Row places: a token's row of another rank should cross NVLink once, not once for each of its experts on this rank.  Whichever
// dispatch warp has stored it in the pool records where, and one that needs it later for another expert copies it from there.
// Used by dispatch/pull.cuh.
//
// Nobody waits for a place.  A row that is asked for while it is still on its way for another expert is pulled twice, and so are rows
// that the head pulls: to record those too spills registers of some kernels.
//
//   row_places[rank][token]   0: not here yet; else its pool row + 1, of one of its experts
//                             cleared by the head before grid barrier 0; st.relaxed after fence.acq_rel.gpu, ld.acquire.gpu
//
// Where the pools are rings, a place is only recorded if no later row of this launch will be written there.
#pragma once
#include "layout/params.cuh"
#include "ptx/memory.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// Whether a kernel does so: not unpack and prefill, which have no registers left for it.
template <class C>
constexpr bool kKeepsPlaces = C::kRanks > 1 && !C::Policy::kExpands && !kHasHelpers<C>;

template <class C> struct Places {
    const Params& p;
    const u32 rows;   // of all experts, with their padding

    MEGA_DEVICE Places(const Params& p_, const ExpertTable& table)
        : p(p_), rows(table.blocks() * kPoolAlign) {}

    /// Words of the table.
    MEGA_DEVICE static u32 words(const Params& p) { return C::kRanks * (p.most_pairs / C::kTopK); }

    // this bit of an origin says that the rest of it is a row of the pool
    static constexpr u32 kHere = 1u << 31;

    /// The word of the token of an origin.
    MEGA_DEVICE u32* word(u32 from) const {
        const u32 token = (from & kPairMask) / C::kTopK;
        return p.row_places + (from >> kPairBits) * (p.most_pairs / C::kTopK) + token;
    }
    /// Where to copy a row from: kHere + its place in the pool if there is one, else its origin.
    MEGA_DEVICE u32 look_up(u32 from) const {
        if (from >> kPairBits == p.rank) return from;
        const u32 place = ptx::load_acquire(word(from));
        return place == 0 ? from : kHere + place - 1;
    }
    /// Records that row `row`, which lies at `pool_row`, has come `from` an origin; nothing if it was copied from another place.
    MEGA_DEVICE void record(u32 from, u32 row, u32 pool_row) const {
        if (from < kHere && from >> kPairBits != p.rank && row + p.pool_rows >= rows)
            ptx::store_relaxed(word(from), pool_row + 1);
    }
};

}   // namespace megamoe
