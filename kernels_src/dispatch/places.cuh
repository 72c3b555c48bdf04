// A row of another rank comes over NVLink once, or a few times, and not for each of its token's experts: whoever has stored it
// in the pool writes down where, and who needs it later copies it from there.
//
// Nobody waits for it.  A row that is on its way to one expert while another one's is asked for is pulled twice, and so are
// those that the head pulls: to write them down there too spills registers of some kernels.
//
//   row_places[rank][token]   0: not here yet; else its place in the pool + 1, of one expert or another
//
// A place is written down only if nothing will lie there later in the launch, where the pools are rings.
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// Whether it is done: not where packed weights are expanded for rows in numbers, whose kernels have no registers left.
template <class C>
constexpr bool kKeepsPlaces = C::kRanks > 1 && !C::Policy::kExpands && C::Policy::kPacked == 0;

template <class C> struct Places {
    const Params& p;
    const u32 rows;   // of all experts, with padding

    MEGA_DEVICE Places(const Params& p_, const ExpertTable& table)
        : p(p_), rows(table.blocks() * kPoolAlign) {}

    /// Words of the table.
    MEGA_DEVICE static u32 words(const Params& p) { return C::kRanks * (p.most_pairs / C::kTopK); }

    // of an origin: the row is to be copied from this place in the pool
    static constexpr u32 kHere = 1u << 31;

    /// Of the input row that a pair speaks of.
    MEGA_DEVICE u32* word(u32 from) const {
        const u32 token = (from & ((1u << kPairBits) - 1)) / C::kTopK;
        return p.row_places + (from >> kPairBits) * (p.most_pairs / C::kTopK) + token;
    }
    /// The origin of a row, or its place if it is here.
    MEGA_DEVICE u32 look_up(u32 from) const {
        if (from >> kPairBits == p.rank) return from;
        const u32 place = ptx::load_acquire(word(from));
        return place == 0 ? from : kHere + place - 1;
    }
    /// Row `row` of all has come to `pool_row`, from an origin or from another place.
    MEGA_DEVICE void record(u32 from, u32 row, u32 pool_row) const {
        if (from < kHere && from >> kPairBits != p.rank && row + p.pool_rows >= rows)
            ptx::store_relaxed(word(from), pool_row + 1);
    }
};

}   // namespace megamoe
