// Unpack: packed weights become e5m2 in shared memory while the tensor cores multiply.  A fourth warpgroup, the helpers, reads packed
// k-blocks from a ring of their own and writes the weights of the stages.
//
//   mbarrier          arrivals                                                    waited for by
//   packed_full[i]    1: weights lane, plus its bytes                             helper warps
//   packed_empty[i]   4: a lane of every helper warp                              weights lane
//   full[stage]       5: activations lane, plus its bytes; a lane of every        math warps
//                     helper warp
//   empty[stage]      8: a lane of every math warp                                activations lane, helper warps
//
// Proxies: helpers write the weights of a stage by ordinary stores and WGMMA reads them through the async proxy, so every lane has a
// proxy fence before its warp arrives.
//
// Products with both operands in shared memory take nearly all of its bandwidth and leave little to the helpers.  So activations are
// read into registers, once for the four quarters of a k-block.  And since the helpers' registers are taken from the math warps, these
// have one fresh accumulator instead of two: while one warpgroup promotes, the other one's products run.
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
/// How the weights lane brings a tile's packed weights into their ring.
template <class C>
using PackedStream = CodesAndExponents<C, kPackedBits, kPackedGroup, Shared<C>::kPackedCodes,
                                       InPackedRing<C>>;

/// What a helper thread holds of 64 weight rows, of which each warp has sixteen: whole groups.
template <class C, bool kWholeGroups> struct HelperRows {
    PackedGroups rows;

    /// Of rows `m` of the k-block at address `packed`.
    MEGA_DEVICE void load(u32 packed, u32 m, u32 thread) {
        rows.load(packed, packed + Shared<C>::kPackedCodes, m, thread);
    }
    /// To the stage whose weights are at this address: what is to be stored before the next rows are loaded, and what after that.
    MEGA_DEVICE void unpack_before(u32 weights, u32 m, u32 thread) const {
        rows.store_row(weights, m, thread, 0);
    }
    MEGA_DEVICE void unpack_after(u32 weights, u32 m, u32 thread) const {
        rows.store_row(weights, m, thread, 1);
    }
};
/// With fewer registers (kHelperRegisters): eight codes of a group at a time.
template <class C> struct HelperRows<C, false> {
    PackedRows rows;

    /// The bytes of `PackedRows::load`.  Written so, as ptxas then finds registers for it: packed_place times sixteen, and sums in
    /// another order.
    MEGA_DEVICE void load(u32 packed, u32 m, u32 thread) {
        const u32 place = thread * 16 ^ (thread * 2 & 48);
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
            rows.codes[h] = ptx::load16_shared(packed + place + (m * 2 + h) * (kGroup * 16));
        ptx::load8_shared(
            packed + Shared<C>::kPackedCodes + m * PackedPiece::kExponentBytes + thread / 4 * 8,
            rows.exponents[0], rows.exponents[1]);
    }
    MEGA_DEVICE void unpack_before(u32, u32, u32) const {}
    MEGA_DEVICE void unpack_after(u32 weights, u32 m, u32 thread) const {
        const u32 place = unpacked_place(weights + thread / kWarp * (16 * kBlockK), thread % kWarp);
        unpack_rows(place + m * PackedPiece::kBytes, rows);
    }
};

/// What the helper warps run: each unpacks sixteen of every 64 weight rows.  Helpers go through all tiles and their k-blocks in order, so
/// they keep positions in both rings and need no `k_begin`.
template <class C> struct Unpacker {
    const Params& p;
    const Shared<C>& shared;

    /// One k-block, from address `packed` into a stage.  Packed rows, and its weight scales, by four lanes, are loaded before the stage
    /// is waited for.
    MEGA_DEVICE void block(u32 packed, u32 stage, u32 parity, u32 scales, u32 thread) const {
        // in turn, loaded one ahead: the compiler does not move a load before an earlier store
        HelperRows<C, kLessToProduce<C>> rows[2];
        rows[0].load(packed, 0, thread);
        const u32 scale = thread < 4 ? ptx::load4_shared(scales + thread * 4) : 0;
        wait_barrier_watched(shared.empty(stage), parity ^ 1);
        if (thread < 4) ptx::store4_shared(shared.weight_scales(stage) + thread * 4, scale);
        const u32 weights = shared.weights(stage);
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            rows[m % 2].unpack_before(weights, m, thread);
            if (m < 3) rows[(m + 1) % 2].load(packed, m + 1, thread);
            rows[m % 2].unpack_after(weights, m, thread);
        }
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        const u32 thread = threadIdx.x % kGroup;
        const bool one = arrives(thread);
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
                ptx::fence_async_shared();   // WGMMA reads the stage through the async proxy
                __syncwarp();
                if (one) {
                    ptx::mbarrier_arrive(shared.full(ring.stage));
                    ptx::mbarrier_arrive(shared.packed_empty(from.stage));
                }
            }
        }
    }
};

/// A warp's 16 rows of activations of a k-block, as the left operand in registers.
struct ActivationRows {
    u32 a[4][4];   // four words for each 32 of the depth; see ptx::wgmma_m64n64k128

    /// `first`: address of the first of the 16 rows in the stage, which is swizzled.
    MEGA_DEVICE void load(u32 first, u32 lane) {
        const u32 row = first + lane % 16 * kBlockK;
#pragma unroll
        for (u32 k = 0; k < 4; ++k)
            ptx::load_matrix4(row + ((2 * k + lane / 16) ^ lane % 8) * 16, a[k]);
    }
};

/// The main loop of unpack: that of mma/block_scaled.cuh with one fresh accumulator, and with activations in registers.
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
