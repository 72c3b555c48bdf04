// The main loop with operands swapped for more than 64 columns: D[n, m], packed weights by tokens.
//
// As in swapped.cuh a warpgroup has two blocks of 64 weight rows and makes left operands of them in registers, here once for
// all columns of a large tile.  With its result there are registers for one operand and one fresh accumulator, so a product is
// waited for, and promoted, before the next one:
//
//   issue      A                                    B
//   load          codes of B, scales                   codes of A of the next k-block, scales
//   wait for                        A                                     B
//   then                               promote A, make B                     promote B, make A, release
//
// What runs beside a product is the other warpgroup's work.
//
//   full[stage]    waited for here     arrived by the two load warps (roles/load.cuh)
//   empty[stage]   arrived here, one lane per warp, when both products of the stage are done
#pragma once
#include "mma/swapped.cuh"

namespace megamoe {

template <class C, u32 kN> struct OneByOneLoop {
    using Rows = typename C::Weights::Rows;
    using Packed = typename C::Weights::Packed;
    using Fresh = ptx::Accumulator<kN / 2>;

    const Shared<C>& shared;
    u32 group, place;   // which warpgroup; the thread's in it (packed_place)
    bool half;   // the tile has 128 rows, and a warpgroup one block, which it multiplies twice

    MEGA_DEVICE void wait(const Ring<C::kStages>& ring) const {
        wait_barrier_watched(shared.full(ring.stage), ring.parity);
    }
    MEGA_DEVICE void load(Packed& packed, u32 stage, u32 which) const {
        packed.load(shared.weights(stage), shared.exponents(stage),
                    half ? group : group * 2 + which, place);
    }
    MEGA_DEVICE void issue(Fresh& fresh, const Rows& rows, u32 stage) const {
        ptx::wgmma_fence();
        rows.template multiply<kN>(fresh, ptx::matrix_descriptor(shared.acts(stage)));
        ptx::wgmma_commit();
    }

    /// One k-block, whose block 0 has been expanded; expands that of the next one, or the same again.
    MEGA_DEVICE void block(Columns<C>& result, Fresh& fresh, Rows& rows, Ring<C::kStages>& ring,
                           const Unit<C>& unit, bool more) const {
        const u32 stage = ring.stage;
        Packed packed;
        ColumnScales<C, kN> by;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            issue(fresh, rows, stage);
            if (i == 0) {
                // it is full, but past a loop ptxas moves nothing: else it would put the making of the operand between the
                // four steps of the product, which would take as long as that
                wait(ring);
                load(packed, stage, 1);
                by.load(shared.act_scales(stage), shared.weight_scales(stage) + group * 8, place);
            } else {
                ring.advance();
                if (more) wait(ring);
                load(packed, more ? ring.stage : stage, 0);
            }
            ptx::wgmma_wait<0>();
            by.promote(result.block[i], fresh, unit);
            rows.expand(packed);
        }
        release_stage(shared, stage, place);
    }

    /// From a stage that is full, of which block 0 has been expanded.
    MEGA_DEVICE void run(Columns<C>& result, Ring<C::kStages> ring, Rows (&rows)[2],
                         const Unit<C>& unit, u32 k_blocks) const {
        Fresh fresh;
#pragma unroll
        for (u32 i = 0; i < kN; ++i) result.block[i / (kN / 2)][i % (kN / 2)] = 0;
        fresh.clear();
#pragma unroll 1
        for (; k_blocks != 0; --k_blocks) {
            OneByOneLoop own = *this;
            // no register is left to keep what is made of it in: it is made anew
            ptx::pin(own.place);
            own.block(result, fresh, rows[0], ring, unit, k_blocks != 1);
        }
    }
};

}   // namespace megamoe
