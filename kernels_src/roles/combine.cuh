// The tail: y[token] = sum over slots of weight * row, in FP32 and in slot order, once every row of the rank's tokens
// has come back.  A warp takes 256 columns of a token at a time; masked slots are not read.
#pragma once
#include "comm/barriers.cuh"
#include "comm/timeline.cuh"
#include "ptx/convert.cuh"

namespace megamoe {

template <class C> struct Combine {
    static constexpr u32 kColumns = kWarp * 8, kParts = ceil_div(C::kHidden, kColumns);
    static constexpr u32 kTailThreads = kWarp + kMathGroups * kGroup;
    static constexpr u32 kInFlight = 8;   // slots read at once

    const Params& p;

    /// Adds slots first .. first + kInFlight of the token; lane k of `ids` and `weights` speaks of slot k.
    MEGA_DEVICE void add(float (&sum)[8], const u8* rows, u32 first, u32 chosen, float weights) const {
        Vec16 v[kInFlight];
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i)
            if (first + i < C::kTopK && chosen >> (first + i) & 1) v[i] = ptx::load16(rows + u64(first + i) * (C::kHidden * 2));
#pragma unroll
        for (u32 i = 0; i < kInFlight; ++i) {
            const float w = __shfl_sync(~0u, weights, (first + i) % kWarp);
            if (first + i < C::kTopK && chosen >> (first + i) & 1)
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    sum[2 * j] = __fmaf_rn(w, ptx::bf16_low(v[i].w[j]), sum[2 * j]);
                    sum[2 * j + 1] = __fmaf_rn(w, ptx::bf16_high(v[i].w[j]), sum[2 * j + 1]);
                }
        }
    }

    /// The publisher warp, between the math warps' two barriers: all blocks and ranks have scattered their rows.  It is
    /// not done by a math warp, since the timer of a deadline there would make the main loop spill.
    MEGA_DEVICE void meet_all(u32 epoch, Timeline<C>& timeline) const {
        ptx::named_sync(kBarrierTail, kTailThreads);
        timeline.start();
        if (ptx::lane_id() == 0) {
            meet_ranks<C::kRanks>(p, Phase::results, epoch);
            if (C::kRanks > 1 && blockIdx.x == 0) p.control[kControlEpoch] = epoch;
        }
        __syncwarp();
        ptx::named_sync(kBarrierTail, kTailThreads);
        if constexpr (C::kTimeline) {
            if (ptx::lane_id() == 0) timeline.done(Span::tail_barrier);
            ptx::named_sync(kBarrierTail, kTailThreads);
            if (ptx::lane_id() == 0) timeline.done(Span::combine);
        }
    }

    MEGA_DEVICE void item(u32 token, u32 part) const {
        const u32 lane = ptx::lane_id(), slot = token * C::kTopK + lane;
        const bool mine = lane < C::kTopK;
        const i64 id = mine ? symmetric<const i64>(p, p.rank, p.topk_ids)[slot] : -1;
        const float weights = mine ? symmetric<const float>(p, p.rank, p.topk_weights)[slot] : 0;
        const u32 chosen = __ballot_sync(~0u, static_cast<u64>(id) < C::kExperts);
        const u32 column = part * kColumns + lane * 8;
        const u8* rows = symmetric<const u8>(p, p.rank, p.combine) + u64(token) * C::kTopK * (C::kHidden * 2) + column * 2;
        const u32 inside = column < C::kHidden ? chosen : 0;   // the last part may be half as wide
        float sum[8] = {};
#pragma unroll
        for (u32 first = 0; first < C::kTopK; first += kInFlight) add(sum, rows, first, inside, weights);
        Vec16 out;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) out.w[j] = ptx::pack_bf16(sum[2 * j], sum[2 * j + 1]);
        if (column < C::kHidden) ptx::store16(p.y + u64(token) * C::kHidden + column, out);
    }

    /// The math warps.
    MEGA_DEVICE void run() const {
        ptx::named_sync(kBarrierTail, kTailThreads);
        ptx::named_sync(kBarrierTail, kTailThreads);
        const u32 warp = (ptx::warp_id() - kGroup / kWarp) * gridDim.x + blockIdx.x;
        for (u32 i = warp; i < p.tokens * kParts; i += kMathWarps * gridDim.x) item(i / kParts, i % kParts);
        if constexpr (C::kTimeline) ptx::named_sync(kBarrierTail, kTailThreads);
    }
};

}  // namespace megamoe
