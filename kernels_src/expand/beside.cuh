// The main loop that unpacks weights of four bits on their way: as mma/block_scaled.cuh computes, but a k-block's weights lie packed
// in their stage, and the math warps make e5m2 of them, in shared memory, one k-block ahead and beside the running product.
//
// Shared memory is what is scarce: a product of 64 x 64 with both operands in it takes nearly all it can give.  So
// activations are read into registers once for the four quarters of a k-block, and each warpgroup unpacks half of the 256
// rows of weights for both.
//
//   quarter           0                  1          2          3
//   before            load A, release the stage, wait for the unpacked weights and for the next stage
//   issue             0                  1          2          3
//   unpack, of the    first 64 rows of   the        second     the others;
//   next k-block      this group, half   others     64         announce them
//   wait, promote     0                  1          2          3
//
// One fresh accumulator of 64 columns has to do, for there are no registers for a second: while a warpgroup promotes, the other
// one's products run.
//
//   full[stage]       waited for here, a k-block early     arrived by the two load warps (roles/load.cuh)
//   empty[stage]      arrived here, once its activations are in registers: its weights were unpacked before
//   unpacked_full[i]  arrived by each math warp with its part of the k-block     waited for by all of them
//
// There are three places for unpacked weights.  A warp writes into one only when all have announced the k-block two uses before it
// as unpacked, and each did so after it had waited for its products of the one before that: those that lay there.
#pragma once
#include "expand/unpack.cuh"
#include "mma/block_scaled.cuh"

namespace megamoe {

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

template <class C> struct UnpackingLoop {
    static_assert(C::Policy::kUnpacked == 3, "places for unpacked weights");

    const Shared<C>& shared;
    Ring<C::kStages> ring;              // of the k-block that is multiplied next
    Ring<C::Policy::kUnpacked> place;   // of its unpacked weights
    u32 row;                            // first row of the activation tile that this warpgroup multiplies
    u32 thread;                         // read once: the special register is slow

    MEGA_DEVICE UnpackingLoop(const Shared<C>& shared_, u32 k_begin, u32 row_)
        : shared(shared_), ring(k_begin), place(k_begin), row(row_),
          thread(ptx::thread_id_again()) {}

    /// A quarter of this warp's part of a k-block, into place `to`.
    template <u32 kQuarter> MEGA_DEVICE void unpack(u32 stage, u32 to) const {
        const u32 m = (thread / kGroup - 1) * 2 + kQuarter / 2, inside = thread % kGroup;
        const Vec16 codes = ptx::load16_shared(shared.weights(stage) +
                                               (m * 2 + kQuarter % 2) * (kGroup * 16) + inside * 16);
        u32 exponents[2];
        ptx::load8_shared(shared.exponents(stage) + m * 256 + inside / 4 * 8, exponents[0],
                          exponents[1]);
        const u32 rows = shared.unpacked(to) + (m * 64 + inside / kWarp * 16) * kBlockK;
        unpack_half<kQuarter % 2>(unpacked_place(rows, thread % kWarp), codes, exponents);
    }
    MEGA_DEVICE void announce(u32 to) const {
        ptx::fence_async_shared();   // the tensor cores read it
        __syncwarp();
        if (thread % kWarp == 0) ptx::mbarrier_arrive(shared.unpacked_full(to));
    }
    MEGA_DEVICE void unpack_all(u32 stage, u32 to) const {
        unpack<0>(stage, to), unpack<1>(stage, to), unpack<2>(stage, to), unpack<3>(stage, to);
        announce(to);
    }
    MEGA_DEVICE void release(u32 stage) const {
        __syncwarp();
        if (thread % kWarp == 0) ptx::mbarrier_arrive(shared.empty(stage));
    }

    template <u32 kQuarter>
    MEGA_DEVICE void quarter(Result& result, const ActivationRows& rows, u64 weights,
                             const BlockScales& scales, bool more, u32 to) const {
        float fresh[32];
        ptx::wgmma_fence();
        ptx::wgmma_m64n64k128(fresh, rows.a, weights + kQuarter * ptx::kDescriptorRows64);
        ptx::wgmma_commit();
        if (more) {
            unpack<kQuarter>(ring.stage, to);
            if constexpr (kQuarter == 3) announce(to);
        }
        ptx::wgmma_wait<0>(fresh);
        promote_quarter(result, fresh, scales, kQuarter);
    }

    /// A k-block, and the unpacking of the next one, if the tile has more.
    MEGA_DEVICE void block(Result& result, bool more) {
        const u32 stage = ring.stage, from = place.stage, warp_rows = row + thread / kWarp % 4 * 16;
        ActivationRows rows;
        BlockScales scales;
        rows.load(shared.acts(stage) + warp_rows * kBlockK, thread % kWarp);
        scales.load(shared.act_scales(stage) + (warp_rows + thread % kWarp / 4) * 4,
                    shared.weight_scales(stage));
        release(stage);
        ring.advance();
        wait_barrier_watched(shared.unpacked_full(from), place.parity);
        place.advance();
        if (more) wait_barrier_watched(shared.full(ring.stage), ring.parity);
        u64 weights = ptx::matrix_descriptor(shared.unpacked(from));
        quarter<0>(result, rows, weights, scales, more, place.stage);
        quarter<1>(result, rows, weights, scales, more, place.stage);
        quarter<2>(result, rows, weights, scales, more, place.stage);
        quarter<3>(result, rows, weights, scales, more, place.stage);
    }

    MEGA_DEVICE void begin() const {
        wait_barrier_watched(shared.full(ring.stage), ring.parity);
        unpack_all(ring.stage, place.stage);
    }

    MEGA_DEVICE void run(Result& result, u32 k_blocks) {
#pragma unroll
        for (u32 q = 0; q < 4; ++q)
#pragma unroll
            for (u32 i = 0; i < 32; ++i) result.quarter[q][i] = 0;
        begin();
        for (; k_blocks > 0; --k_blocks) block(result, k_blocks > 1);
    }

    /// This warpgroup's rows are all padding: it only unpacks its half of the weights, in step with the other.
    MEGA_DEVICE void skip(u32 k_blocks) {
        begin();
        for (; k_blocks > 0; --k_blocks) {
            release(ring.stage);
            ring.advance();
            wait_barrier_watched(shared.unpacked_full(place.stage), place.parity);
            place.advance();
            if (k_blocks == 1) return;
            wait_barrier_watched(shared.full(ring.stage), ring.parity);
            unpack_all(ring.stage, place.stage);
        }
    }
};

}   // namespace megamoe
