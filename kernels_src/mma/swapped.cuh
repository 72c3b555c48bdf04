// The main loop with operands swapped: D[n, m], weights by tokens.
//
// What block_scaled.cuh multiplies as 64 tokens by 256 weights, mostly by padding where an expert has few tokens, is here 64
// weights by kN tokens, 8 or more.  A tile's 256 weight rows are four blocks of 64, two for each math warpgroup.  How a
// block's weights become the left operand knows their format: from shared memory as they are, or through registers, where
// they become what the tensor cores multiply.  That costs instructions, so one block is loaded while the other is multiplied.
// More than 32 tokens are multiplied in parts of 32, with two fresh accumulators in turn.  Of k-blocks A and B, with two parts:
//
//   step       0         1         2         3         4         5
//   issue      A 0, 0    A 0, 1    A 1, 0    A 1, 1    B 0, 0    B 0, 1        block, part
//   load                 A 1                 B 0                 B 1           block
//   wait for             A 0, 0    A 0, 1    A 1, 0    A 1, 1    B 0, 0        and promote; after the last part, release
//
// Nothing is in flight across the loop's back edge, or ptxas would serialise all of it: after some k-blocks it drains.
//
//   full[stage]    waited for here     arrived by the two load warps (roles/load.cuh)
//   empty[stage]   arrived here, one lane per warp, when both products of the stage are done
#pragma once
#include "comm/fault.cuh"
#include "layout/shared.cuh"
#include "pipe/ring.cuh"
#include "ptx/control.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

/// Of the two blocks of a warpgroup.  Thread t of warp w holds, of every 8 tokens, those of 2(t%4) and the next, of rows
/// 16w + t/4 (registers 4i, 4i+1) and 16w + t/4 + 8 (4i+2, 4i+3).  Of GEMM 1 these are gate and up of the same output.
template <u32 kN> struct Columns {
    float block[2][kN / 2];
};

/// Scales of a k-block for a thread's numbers.
template <u32 kN> struct ColumnScales {
    float act[kN / 4];   // of its tokens
    float weight[2];     // of its rows

    /// Addresses of the first token's scale, and of those of the warpgroup's rows (mma/scales.cuh): both its blocks lie in the
    /// same 128 rows.
    MEGA_DEVICE void load(u32 act_scales, u32 weight_scales, u32 lane) {
#pragma unroll
        for (u32 i = 0; i < kN / 8; ++i)
            ptx::load_floats_shared(act_scales + i * 32 + lane % 4 * 8, act[2 * i], act[2 * i + 1]);
        ptx::load_floats_shared(weight_scales, weight[0], weight[1]);
    }
    /// result += fresh * scales, of kPart tokens from `first` on.
    template <u32 kPart>
    MEGA_DEVICE void promote(float (&result)[kN / 2], const float (&fresh)[kPart / 2],
                             u32 first) const {
#pragma unroll
        for (u32 i = 0; i < kPart / 2; ++i) {
            float& d = result[first / 2 + i];
            d = __fmaf_rn(fresh[i], act[first / 4 + i / 4 * 2 + i % 2] * weight[i / 2 % 2], d);
        }
    }
};

/// K-blocks written out per iteration: both depths are multiples of it.
// clang-format off
template <class C>
constexpr u32 kSwappedKBlocks =
    C::kHidden / kBlockK % 2 == 0 && C::kIntermediate / kBlockK % 2 == 0 ? 2 : 1;
// clang-format on

template <class C, u32 kN> struct SwappedLoop {
    static constexpr u32 kPart = min_u32(kN, 32), kParts = kN / kPart;
    using Rows = typename C::Weights::Rows;

    const Shared<C>& shared;
    u32 group, thread;   // which warpgroup; thread of it
    bool half;           // the tile has 128 rows, and a warpgroup one block, which it multiplies twice

    MEGA_DEVICE u32 block(u32 which) const { return half ? group : group * 2 + which; }

    MEGA_DEVICE void issue(float (&fresh)[kPart / 2], const Rows& rows, u32 stage, u32 part) const {
        ptx::wgmma_fence();
        rows.template multiply<kPart>(
            fresh, ptx::matrix_descriptor(shared.acts(stage) + part * (kPart * kBlockK)));
        ptx::wgmma_commit();
    }
    MEGA_DEVICE void load(Rows& rows, u32 stage, u32 which) const {
        rows.load(shared.weights(stage), shared.exponents(stage), block(which), thread);
    }
    MEGA_DEVICE void release(u32 stage) const {
        __syncwarp();   // all lanes have read their weights and scales
        if (thread % kWarp == 0) ptx::mbarrier_arrive(shared.empty(stage));
    }

    /// A few k-blocks, written out; nothing is in flight before or after.  The first one's block 0 has been loaded, and so
    /// is the next one's after, unless this was the last.
    MEGA_DEVICE void iterate(Columns<kN>& result, Rows (&rows)[2], Ring<C::kStages>& ring,
                             bool last) const {
        constexpr u32 kSteps = kSwappedKBlocks<C> * 2 * kParts;
        float fresh[2][kPart / 2];
        ColumnScales<kN> scales;
        u32 stage = ring.stage;
#pragma unroll
        for (u32 i = 0; i <= kSteps; ++i) {   // issues step i, promotes the one before
            const u32 which = i / kParts % 2, part = i % kParts, before = (i + 2 * kParts - 1) % (2 * kParts);
            const u32 old = stage;
            const bool loads = i < kSteps && part == kParts - 1, more = !(last && i == kSteps - 1);
            const bool early = kParts > 1 && which == 0;
            if (i < kSteps) {
                stage = ring.stage;
                issue(fresh[i % 2], rows[which], stage, part);
            }
            // with one part the other block may still be in a product
            const auto next = [&] {
                if (which == 1) ring.advance();
                if (which == 1 && more) wait_barrier_watched(shared.full(ring.stage), ring.parity);
                if (which == 0 || more) load(rows[1 - which], ring.stage, 1 - which);
            };
            if (loads && early) next();
            if (i > 0) {
                if (before == 0)
                    scales.load(shared.act_scales(old), shared.weight_scales(old) + group * 8,
                                thread % kWarp);
                if (i < kSteps) ptx::wgmma_wait<1>(fresh[(i - 1) % 2]);
                else ptx::wgmma_wait<0>(fresh[(i - 1) % 2]);
                scales.template promote<kPart>(result.block[before / kParts], fresh[(i - 1) % 2],
                                               before % kParts * kPart);
                if (before == 2 * kParts - 1) release(old);
            }
            if (loads && !early) next();
        }
    }

    MEGA_DEVICE void run(Columns<kN>& result, u32 k_begin, u32 k_blocks) const {
        Ring<C::kStages> ring(k_begin);
        Rows rows[2];
#pragma unroll
        for (u32 i = 0; i < kN; ++i) result.block[i / (kN / 2)][i % (kN / 2)] = 0;
        wait_barrier_watched(shared.full(ring.stage), ring.parity);
        load(rows[0], ring.stage, 0);
#pragma unroll 1
        for (; k_blocks != 0; k_blocks -= kSwappedKBlocks<C>)
            iterate(result, rows, ring, k_blocks == kSwappedKBlocks<C>);
    }
};

}   // namespace megamoe
