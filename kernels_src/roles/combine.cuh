// The tail: y[token] = sum over its slots of weight * row, in FP32 and in slot order, once all rows of the rank's tokens have come back.
// Run by the math warps after their last tile (`run`); the publisher warp meets the other blocks and ranks for them (`meet_all`).
//
// Combine is as fast as the memory if enough loads are in flight; they go to the room of the stages, which are free by now.  A warp has a
// run of pieces, each 256 columns of a token in all its slots.  Each lane copies 16 bytes of every slot by `cp.async` to a place that only
// it uses, as many pieces ahead as there is room for, so no warp waits for another.  Masked slots are not read.
//
//   named barrier kBarrierTail   publisher warp, eight math warps; once when all have finished the block's last tile, and once when all
//                                blocks and ranks have met
#pragma once
#include "comm/barriers.cuh"
#include "comm/timeline.cuh"
#include "layout/shared.cuh"
#include "ptx/convert.cuh"
#include "stage/inputs.cuh"

namespace megamoe {

template <class C> struct Combine {
    static constexpr u32 kColumns = kWarp * 8, kParts = ceil_div(C::kHidden, kColumns);
    static constexpr u32 kTailThreads = kWarp + kMathGroups * kGroup;
    static constexpr u32 kPieceBytes = C::kTopK * kColumns * 2;
    // pieces in flight per warp
    static constexpr u32 kDepth = min_u32(8, Shared<C>::kStagingAt / (kMathWarps * kPieceBytes));
    // bytes of a piece's header: the weight of each slot, and a bit mask of the slots that are not masked
    static constexpr u32 kHeader = (C::kTopK + 1) * 4;
    static_assert(C::kTopK <= kWarp, "a lane, and a bit of a mask, for each slot of a token");
    static_assert(kDepth >= 1 && kDepth * kHeader <= kStagingBytes, "no room for a piece in flight");

    const Params& p;
    const Shared<C>& shared;

    /// By the publisher warp, between the math warps' two barriers: waits until all blocks and ranks have scattered their rows.  A math
    /// warp cannot do it, since the timer of the deadline would make ptxas spill in the main loop.
    MEGA_DEVICE void meet_all(u32 epoch, Timeline<C>& timeline) const {
        ptx::named_sync(kBarrierTail, kTailThreads);
        timeline.start();
        if (ptx::lane_id() < kMeetingThreads<C::kRanks>) {
            meet<C::kRanks>(p, Meeting::results, epoch);
            if (C::kRanks > 1 && blockIdx.x == 0) p.control[kControlEpoch] = epoch;
            if (blockIdx.x == 0) p.control[kControlSides] = 0;
        }
        __syncwarp();
        ptx::named_sync(kBarrierTail, kTailThreads);
        if constexpr (C::kTimeline) {
            if (ptx::lane_id() == 0) timeline.done(Span::tail_barrier);
            ptx::named_sync(kBarrierTail, kTailThreads);
            if (ptx::lane_id() == 0) timeline.done(Span::combine);
        }
    }

    /// Where this lane keeps slot 0 of a piece.
    MEGA_DEVICE u32 place(u32 warp, u32 piece) const {
        return shared.address + (warp * kDepth + piece % kDepth) * kPieceBytes + ptx::lane_id() * 16;
    }
    MEGA_DEVICE u32 header(u32 warp, u32 piece) const {
        return shared.staging(warp) + piece % kDepth * kHeader;
    }

    /// Bit mask of the slots of a token that are not masked; `weight` becomes that of slot `lane`.
    MEGA_DEVICE u32 look_up(u32 token, float& weight) const {
        const u32 lane = ptx::lane_id(), slot = token * C::kTopK + lane;
        const bool mine = lane < C::kTopK;
        const i64 id = mine ? input_id<C>(p, slot) : -1;
        weight = mine ? input_weight<C>(p, slot) : 0;
        return __ballot_sync(~0u, static_cast<u64>(id) < C::kExperts);
    }
    /// The first of this lane's eight columns.  A token's last piece may be half as wide: then it is beyond `hidden` in half of the lanes.
    MEGA_DEVICE static u32 column(u32 piece) {
        return piece % kParts * kColumns + ptx::lane_id() * 8;
    }

    /// Starts the copies of a piece and writes its header.
    MEGA_DEVICE void request(u32 warp, u32 piece, u32 chosen, float weight) const {
        const u32 lane = ptx::lane_id(), at = place(warp, piece);
        if (lane < C::kTopK)
            ptx::store4_shared(header(warp, piece) + lane * 4, __float_as_uint(weight));
        if (lane == 0) ptx::store4_shared(header(warp, piece) + C::kTopK * 4, chosen);
        const u8* rows = symmetric<const u8>(p, p.rank, p.combine) +
                         (u64(piece / kParts) * C::kTopK * C::kHidden + column(piece)) * 2;
        if (column(piece) >= C::kHidden) return;
#pragma unroll 4
        for (u32 k = 0; k < C::kTopK; ++k)
            if (chosen >> k & 1)
                ptx::copy16_async(at + k * (kColumns * 2), rows + k * (C::kHidden * 2));
    }

    /// Adds up a piece that has come, and stores it.
    MEGA_DEVICE void add(u32 warp, u32 piece) const {
        const u32 at = place(warp, piece), head = header(warp, piece),
                  chosen = ptx::load4_shared(head + C::kTopK * 4);
        if (column(piece) >= C::kHidden) return;
        float sum[8] = {};
#pragma unroll 4
        for (u32 k = 0; k < C::kTopK; ++k) {
            if (!(chosen >> k & 1)) continue;
            const float w = ptx::load_float_shared(head + k * 4);
            const Vec16 v = ptx::load16_shared(at + k * (kColumns * 2));
            ptx::add_scaled_bf16(sum, w, v);
        }
        const u64 first = u64(piece / kParts) * C::kHidden + column(piece);   // of y
        if constexpr (C::kFloat32Out) {
            float* y = reinterpret_cast<float*>(p.y) + first;
#pragma unroll
            for (u32 i = 0; i < 8; i += 4) {
                Vec16 out;
#pragma unroll
                for (u32 j = 0; j < 4; ++j) out.w[j] = __float_as_uint(sum[i + j]);
                ptx::store16(y + i, out);
            }
        } else {
            Vec16 out;
#pragma unroll
            for (u32 j = 0; j < 4; ++j) out.w[j] = ptx::pack_bf16(sum[2 * j], sum[2 * j + 1]);
            ptx::store16(p.y + first, out);
        }
    }

    /// By the math warps.
    MEGA_DEVICE void run() const {
        ptx::named_sync(kBarrierTail, kTailThreads);
        ptx::named_sync(kBarrierTail, kTailThreads);
        const u32 warp = ptx::warp_id() - kGroupWarps, warps = kMathWarps * gridDim.x;
        const u32 mine = ptx::block_id_again() * kMathWarps + warp, pieces = p.tokens * kParts;
        // the first `longer` warps take one more
        const u32 each = pieces / warps, longer = pieces % warps;
        const u32 begin = mine * each + min_u32(mine, longer), end = begin + each + (mine < longer);
        u32 chosen = 0;
        float weight = 0;
        for (u32 i = begin; i < end + kDepth - 1; ++i) {
            if (i < end) {
                if (i == begin || i % kParts == 0) chosen = look_up(i / kParts, weight);
                request(warp, i, chosen, weight);
            }
            ptx::copy_async_commit();
            ptx::copy_async_wait<kDepth - 1>();
            __syncwarp();   // headers are written by some lanes and read by all; the next request comes after the second
            if (kDepth == 1 || i - begin >= kDepth - 1) add(warp, i - (kDepth - 1));
            __syncwarp();
        }
        if constexpr (C::kTimeline) ptx::named_sync(kBarrierTail, kTailThreads);
    }
};

}   // namespace megamoe
