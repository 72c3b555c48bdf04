// Unpack: packed weights become e5m2 in shared memory while the tensor cores multiply.  A fourth warpgroup, the helpers, reads packed
// k-blocks from a ring of their own, of as many places as there are stages, and writes the weights of the stages.
//
//   mbarrier          arrivals                                                    waited for by
//   packed_full[i]    1: weights lane, plus its bytes                             helper warps
//   packed_empty[i]   4: a lane of every helper warp                              weights lane
//   full[stage]       5: activations lane, plus its bytes; a lane of every        math warps
//                     helper warp
//   empty[stage]      8: a lane of every math warp                                activations lane, helper warps
//
// The weights lane writes a k-block's weight scales beside the stage when it loads the packed ones, which may be before the stage is free.
// So each stage has two places for them, in turn.  Those of k-block j are free when the helpers have unpacked k-block j - stages: they
// have waited for the stage then, that is, for the math warps to be done with k-block j - 2 stages.
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

/// What the helper warps run: each unpacks sixteen of every 64 weight rows.  Helpers go through all tiles and their k-blocks in order, so
/// they keep a position, in both rings, and need no `k_begin`.
template <class C> struct Unpacker {
    const Params& p;
    const Shared<C>& shared;

    /// One k-block, from its place of the packed ring into the stage.  Packed rows are loaded before the stage is waited for.
    MEGA_DEVICE void block(const Ring<C::kStages>& ring, const PackedGroups::Offsets& offsets) const {
        const u32 codes = shared.packed(ring.stage), exponents = codes + Shared<C>::kPackedCodes,
                  weights = shared.weights(ring.stage);
        // in turn, loaded one ahead: the compiler does not move a load before an earlier store
        PackedGroups rows[2];
        wait_barrier_watched(shared.packed_full(ring.stage), ring.parity);
        rows[0].load(codes, exponents, 0, offsets);
        wait_barrier_watched(shared.empty(ring.stage), ring.parity ^ 1);
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            rows[m % 2].store_row(weights, m, offsets, 0);
            if (m < 3) rows[(m + 1) % 2].load(codes, exponents, m + 1, offsets);
            rows[m % 2].store_row(weights, m, offsets, 1);
        }
    }

    MEGA_DEVICE void run() const {
        const TileSlots<C> slots{p, shared};
        const u32 thread = threadIdx.x % kGroup;
        const bool one = arrives(thread);
        const PackedGroups::Offsets offsets(thread);
        Ring<C::kStages> ring;
        for (u32 index = 0;; ++index) {
            const TileView tile = slots.watched(index);
            if (tile.kind() == Tile::stop) break;
            const u32 k_blocks = tile.k_blocks();
            __syncwarp();
            if (one) slots.release(index);
#pragma unroll 1
            for (u32 k = 0; k < k_blocks; ++k, ring.advance()) {
                block(ring, offsets);
                ptx::fence_async_shared();   // WGMMA reads the stage through the async proxy
                __syncwarp();
                if (one) {
                    ptx::mbarrier_arrive(shared.full(ring.stage));
                    ptx::mbarrier_arrive(shared.packed_empty(ring.stage));
                }
            }
        }
    }
};

/// A warp's 16 rows of activations of a k-block, as the left operand in registers.
struct ActivationRows {
    u32 a[4][4];   // four words for each 32 of the depth; see ptx::Accumulator::multiply

    /// Where a lane reads them in a stage, which is swizzled, in bytes from its first row; kept, not made for each k-block.
    struct Offsets {
        u32 of[4];

        MEGA_DEVICE Offsets(u32 first_row, u32 lane) {
            const u32 row = (first_row + lane % 16) * kBlockK;
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                of[k] = row + ((2 * k + lane / 16) ^ lane % 8) * 16;
                ptx::pin(of[k]);
            }
        }
    };
    /// From the stage whose activations are at this address.
    MEGA_DEVICE void load(u32 acts, const Offsets& offsets) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) ptx::load_matrix4(acts + offsets.of[k], a[k]);
    }
    /// If `wanted`; else they stay.
    MEGA_DEVICE void load_if(bool wanted, u32 acts, const Offsets& offsets) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) ptx::load_matrix4_if(wanted, acts + offsets.of[k], a[k]);
    }
};

/// The main loop of unpack: that of mma/block_scaled.cuh with one fresh accumulator, and with activations in registers.  The next k-block's
/// are loaded beside the promotion of this one's last quarter, if they are there by then, else after it.  Whether they are is asked
/// before the last product is issued, which stalls the warps anyway, and is for all lanes to agree upon, since they load together.  No
/// other use of the stage can answer: this warp has waited for the one before, in `run` or `skip`, and the one after needs its release.
/// After a tile's last k-block it is asked of another tile's, in vain: each tile makes a loop of its own.
template <class C> struct NarrowLoop : StageReader<C> {
    using Base = StageReader<C>;
    using Base::Base, Base::shared, Base::ring, Base::row, Base::thread, Base::release;
    ActivationRows rows;   // of the ring's stage

    MEGA_DEVICE void wait(const ActivationRows::Offsets& offsets) {
        wait_barrier_watched(shared.full(ring.stage), ring.parity);
        rows.load(shared.acts(ring.stage), offsets);
    }

    /// `my_scale`: where that of this thread's first row is among a stage's.  `more`: this is not the tile's last k-block.
    MEGA_DEVICE void block(Result& result, const ActivationRows::Offsets& offsets, u32 my_scale,
                           bool more) {
        const u32 stage = ring.stage;
        BlockScales scales;
        scales.load(shared.act_scales(stage) + my_scale, shared.weight_scales(stage, ring.parity));
        const u64 weights = ptx::matrix_descriptor(shared.weights(stage));
        ring.advance();
        bool ready = false;
#pragma unroll
        for (u32 q = 0; q < 4; ++q) {
            Fresh fresh;
            if (q == 3)
                ready = __all_sync(~0u, ptx::mbarrier_test(shared.full(ring.stage), ring.parity));
            ptx::wgmma_fence();
            fresh.multiply(rows.a, weights + q * ptx::kDescriptorRows64);
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            if (q == 3) {
                release(stage);
                rows.load_if(ready, shared.acts(ring.stage), offsets);
            }
            promote_quarter(result, fresh, scales, q);
        }
        if (!ready && more) wait(offsets);
    }

    MEGA_DEVICE void run(Result& result, u32 k_blocks) {
        result.clear();
        const u32 first = row + thread / kWarp % 4 * 16;   // of this warp's rows in the tile
        const ActivationRows::Offsets offsets(first, thread % kWarp);
        u32 my_scale = (first + thread % kWarp / 4) * 4;
        ptx::pin(my_scale);
        wait(offsets);
        bool more;
        do {   // whether there are more is known early so
            more = --k_blocks > 0;
            block(result, offsets, my_scale, more);
        } while (more);
    }
};

}   // namespace megamoe
