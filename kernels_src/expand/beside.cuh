// Weights of four bits are unpacked in shared memory beside the products: a warpgroup of helpers makes stages of e5m2 of packed
// k-blocks, which have a ring of their own.
//
//   packed_full[i]    arrived by the weights lane (1), plus its bytes       waited for by the helpers
//   packed_empty[i]   arrived by every helper warp                          waited for by the weights lane
//   full[stage]       arrived by the activations lane (1), plus its bytes, and by every helper warp      waited for by math warps
//   empty[stage]      arrived by every math warp that reads the stage       waited for by activations lane and helpers
//
// Products take nearly all that shared memory gives, and leave little to the helpers.  So activations are read into
// registers, once for the four quarters of a k-block; and since the helpers have their registers from the math warps, there
// is one fresh accumulator: while a warpgroup promotes, the other one's products run.
#pragma once
#include "expand/unpack.cuh"
#include "mma/block_scaled.cuh"
#include "mma/code_stream.cuh"
#include "pipe/tile_slots.cuh"

namespace megamoe {

template <class C> struct InPackedRing {
    MEGA_DEVICE static u32 codes(const Shared<C>& s, u32 i) { return s.packed(i); }
    MEGA_DEVICE static u32 exponents(const Shared<C>& s, u32 i) {
        return s.packed(i) + Shared<C>::kPackedCodes;
    }
};
/// A tile's packed weights on their way into their ring, a k-block after the other.
template <class C> using PackedStream = CodesAndExponents<C, 4, 32, Shared<C>::kPackedCodes,
                                                          InPackedRing<C>>;

/// The helper warps: each unpacks sixteen rows of every 64.
template <class C> struct Unpacker {
    const Params& p;
    const Shared<C>& shared;

    /// The bytes of `PackedRows::load`; with the sum in its order ptxas schedules the loop otherwise, which was not measured.
    MEGA_DEVICE void load(PackedRows& rows, u32 packed, u32 m, u32 thread) const {
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
            rows.codes[h] = ptx::load16_shared(packed + ((m * 2 + h) * kGroup + thread) * 16);
        ptx::load8_shared(packed + Shared<C>::kPackedCodes + m * 256 + thread / 4 * 8,
                          rows.exponents[0], rows.exponents[1]);
    }

    MEGA_DEVICE void block(u32 packed, u32 stage, u32 parity, u32 scales, u32 thread) const {
        PackedRows rows[2];   // a load is not put before an earlier store
        load(rows[0], packed, 0, thread);
        wait_barrier_watched(shared.empty(stage), parity ^ 1);
        if (thread == 0) {
            float s[4];
            ptx::load_floats_shared(scales, s[0], s[1], s[2], s[3]);
            ptx::store_floats_shared(shared.weight_scales(stage), s[0], s[1], s[2], s[3]);
        }
        const u32 place = unpacked_place(shared.weights(stage) + thread / kWarp * (16 * kBlockK),
                                         thread % kWarp);
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            if (m < 3) load(rows[(m + 1) % 2], packed, m + 1, thread);
            unpack_rows(place + m * 64 * kBlockK, rows[m % 2]);
        }
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        const u32 thread = threadIdx.x % kGroup;
        const bool one = thread % kWarp == 0;
        Ring<C::kStages> ring;
        Ring<C::Policy::kPacked> from;
        for (u32 index = 0;; ++index) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) break;
            const u32 k_blocks = tile.k_blocks();
            __syncwarp();
            if (one) slots.release(index);
#pragma unroll 1
            for (u32 k = 0; k < k_blocks; ++k, ring.advance(), from.advance()) {
                wait_barrier_watched(shared.packed_full(from.stage), from.parity);
                block(shared.packed(from.stage), ring.stage, ring.parity,
                      shared.packed_scales(from.stage), thread);
                ptx::fence_async_shared();   // the tensor cores read the stage
                __syncwarp();
                if (one) {
                    ptx::mbarrier_arrive(shared.full(ring.stage));
                    ptx::mbarrier_arrive(shared.packed_empty(from.stage));
                }
            }
        }
    }
};

/// A warp's 16 rows of activations of a k-block.
struct ActivationRows {
    u32 a[4][4];   // 32 of the depth; see ptx::wgmma_m64n64k128

    /// `first`: address of the first of the 16 rows in a swizzled tile.
    MEGA_DEVICE void load(u32 first, u32 lane) {
        const u32 row = first + lane % 16 * kBlockK;
#pragma unroll
        for (u32 k = 0; k < 4; ++k)
            ptx::load_matrix4(row + ((2 * k + lane / 16) ^ lane % 8) * 16, a[k]);
    }
};

/// The main loop of mma/block_scaled.cuh in fewer registers of accumulators, and with activations in registers.
template <class C> struct NarrowLoop : StageReader<C> {
    using Base = StageReader<C>;
    using Base::Base, Base::shared, Base::ring, Base::row, Base::thread, Base::release;

    MEGA_DEVICE void block(Result& result) {
        const u32 stage = ring.stage, warp_rows = row + thread / kWarp % 4 * 16;
        ActivationRows rows;
        BlockScales scales;
        wait_barrier_watched(shared.full(stage), ring.parity);
        ring.advance();
        rows.load(shared.acts(stage) + warp_rows * kBlockK, thread % kWarp);
        scales.load(shared.act_scales(stage) + (warp_rows + thread % kWarp / 4) * 4,
                    shared.weight_scales(stage));
        const u64 weights = ptx::matrix_descriptor(shared.weights(stage));
#pragma unroll
        for (u32 q = 0; q < 4; ++q) {
            float fresh[32];
            ptx::wgmma_fence();
            ptx::wgmma_m64n64k128(fresh, rows.a, weights + q * ptx::kDescriptorRows64);
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>(fresh);
            if (q == 3) release(stage);
            promote_quarter(result, fresh, scales, q);
        }
    }

    MEGA_DEVICE void run(Result& result, u32 k_blocks) {
        result.clear();
        for (; k_blocks > 0; --k_blocks) block(result);
    }
};

}   // namespace megamoe
