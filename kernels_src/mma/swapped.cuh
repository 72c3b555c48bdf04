// The main loop with operands swapped: D[n, m], weights by tokens.
//
// What block_scaled.cuh multiplies as 64 tokens by 256 weights, mostly by padding where an expert has few tokens, is here 64
// weights by kN tokens, 8 or more.  A tile's 256 weight rows are four blocks of 64, two for each math warpgroup.  How a
// block's weights become the left operand knows their format: from shared memory as they are, or through registers, where
// they become what the tensor cores multiply.  That takes longer than the product, so it is done while another one runs.
// With 64 columns, and in wide with 32, the two blocks take turns:
//
//   issue         0 of A         1 of A                      0 of B         1 of B
//   load                1 of A               0 of B               1 of B               0 of C
//   wait for                           0 of A        1 of A                      0 of B
//   promote                            0 of A        1 of A, release A           0 of B
//
// In decode, with 32 or fewer, there are registers for the packed weights of both blocks of the next k-block.  They are loaded while both
// products of this one run, and each is expanded when its own product is over (`at_once`): so shared memory is waited for once in a
// k-block and not twice, and nothing comes between the two products.
//
// More than 64 are another loop's (mma/one_by_one.cuh).
//
// Nothing is in flight across the loop's back edge, or ptxas would serialise all of it.
//
//   full[stage]    waited for here     arrived by the two load warps (roles/load.cuh)
//   empty[stage]   arrived here, one lane per warp, when both products of the stage are done
#pragma once
#include "mma/stages.cuh"
#include "ptx/wgmma.cuh"

namespace megamoe {

/// Of the two blocks of a warpgroup.  Thread t of warp w holds, of every 8 tokens, those of 2(t%4) and the next, of rows
/// 16w + t/4 (registers 4i, 4i+1) and 16w + t/4 + 8 (4i+2, 4i+3).  Of GEMM 1 these are gate and up of the same output.
/// There is room for as many rows as a tile may have; a loop for fewer leaves the others alone.
template <class C> struct Columns {
    float block[2][C::kBlockM / 2];
};

/// The weight scales of a thread's rows in a tile's first k-block.  Scales that are powers of two, and most often the same in all
/// k-blocks (`kEven`), go into the result when it is complete, and fresh numbers are multiplied only where they differ from the
/// first.  That leaves out half of the multiplications and changes no bit.  In loops of up to kFew columns there is nothing to gain.
template <class C> struct Unit {
    static constexpr u32 kFew = 32;
    template <u32 kN> static constexpr bool kEven = C::Weights::kEvenScales && (kN > kFew);
    float weight[2];   // of rows t/4 and t/4 + 8

    MEGA_DEVICE void load(u32 weight_scales) {
        if (kEven<C::kBlockM>) ptx::load_floats_shared(weight_scales, weight[0], weight[1]);
    }
    /// A power of two over one of them.
    MEGA_DEVICE float relative(float scale, u32 row) const {
        return __uint_as_float(__float_as_uint(scale) - __float_as_uint(weight[row]) +
                               __float_as_uint(1.0f));
    }
    /// To the result of a loop of more than kFew columns; what that has not written stays zero.
    MEGA_DEVICE void apply(Columns<C>& result) const {
        if constexpr (kEven<C::kBlockM>)
#pragma unroll
            for (u32 i = 0; i < C::kBlockM; ++i) result.block[i % 2][i / 2] *= weight[i / 4 % 2];
    }
};

/// Scales of a k-block for a thread's numbers.
template <class C, u32 kN> struct ColumnScales {
    float act[kN / 4];   // of its tokens
    float weight[2];     // of its rows

    /// Addresses of the first token's scale, and of those of the warpgroup's rows (mma/scales.cuh): both its blocks lie in the
    /// same 128 rows.  `place`: packed_place of the thread.
    MEGA_DEVICE void load(u32 act_scales, u32 weight_scales, u32 place) {
        const u32 first = (place * 8 ^ place) & 24;   // packed_place(place) % 4 * 8
#pragma unroll
        for (u32 i = 0; i < kN / 8; ++i)
            ptx::load_floats_shared(act_scales + first + i * 32, act[2 * i], act[2 * i + 1]);
        ptx::load_floats_shared(weight_scales, weight[0], weight[1]);
    }
    /// result += fresh * scales.  What was fresh may be changed.
    template <u32 kRoom>
    MEGA_DEVICE void promote(float (&result)[kRoom], ptx::Accumulator<kN / 2>& fresh,
                             const Unit<C>& unit) const {
        constexpr bool kEven = Unit<C>::template kEven<kN>;
        if (kEven && (weight[0] != unit.weight[0] || weight[1] != unit.weight[1])) {
            const float by[2] = {unit.relative(weight[0], 0), unit.relative(weight[1], 1)};
#pragma unroll
            for (u32 i = 0; i < kN / 2; i += 4) fresh.scale(i, by[0], by[1]);
        }
#pragma unroll
        for (u32 i = 0; i < kN / 2; i += 4) {
            const float a = act[i / 2], b = act[i / 2 + 1];
            if (kEven) fresh.add_to(result, i, i + 2, a, b, a, b);
            else
                fresh.add_to(result, i, i + 2, a * weight[0], b * weight[0], a * weight[1],
                             b * weight[1]);
        }
    }
};

template <class C, u32 kN> struct SwappedLoop {
    static_assert(C::kStages >= 2, "the next stage is waited for before this one is released");
    using Rows = typename C::Weights::Rows;
    using Packed = typename C::Weights::Packed;
    using Fresh = ptx::Accumulator<kN / 2>;
    static constexpr bool kAtOnce = kN <= C::Policy::kColumnsAtOnce;

    const Shared<C>& shared;
    u32 group, place;   // which warpgroup; the thread's in it (packed_place)
    bool half;   // the tile has 128 rows, and a warpgroup one block, which it multiplies twice

    MEGA_DEVICE u32 block(u32 which) const { return half ? group : group * 2 + which; }

    MEGA_DEVICE void issue(Fresh& fresh, const Rows& rows, u32 stage) const {
        ptx::wgmma_fence();
        rows.template multiply<kN>(fresh, ptx::matrix_descriptor(shared.acts(stage)));
        ptx::wgmma_commit();
    }
    /// `Form`: Rows, or Packed for codes that are expanded later.
    template <class Form> MEGA_DEVICE void load(Form& rows, u32 stage, u32 which) const {
        rows.load(shared.weights(stage), shared.exponents(stage), block(which), place);
    }

    MEGA_DEVICE ColumnScales<C, kN> scales(u32 stage) const {
        ColumnScales<C, kN> scales;
        scales.load(shared.act_scales(stage), shared.weight_scales(stage) + group * 8, place);
        return scales;
    }
    /// One k-block, whose block 0 has been loaded; loads that of the next one.
    MEGA_DEVICE void in_turn(Columns<C>& result, Rows (&rows)[2], Ring<C::kStages>& ring,
                             const Unit<C>& unit, bool more) const {
        Fresh fresh[2];
        const u32 stage = ring.stage;
        issue(fresh[0], rows[0], stage);
        load(rows[1], stage, 1);
        issue(fresh[1], rows[1], stage);
        const ColumnScales<C, kN> by = scales(stage);
        ptx::wgmma_wait<1>();
        by.promote(result.block[0], fresh[0], unit);
        ring.advance();
        if (more) {
            wait_barrier_watched(shared.full(ring.stage), ring.parity);
            load(rows[0], ring.stage, 0);
        }
        ptx::wgmma_wait<0>();
        by.promote(result.block[1], fresh[1], unit);
        release_stage(shared, stage, place);
    }

    /// One k-block, of which `rows` have been expanded; loads those of the next one meanwhile, or the same again.
    MEGA_DEVICE void at_once(Columns<C>& result, Rows (&rows)[2], Ring<C::kStages>& ring,
                             const Unit<C>& unit, bool more) const {
        Fresh fresh[2];
        Packed packed[2];
        const u32 stage = ring.stage;
        issue(fresh[0], rows[0], stage);
        issue(fresh[1], rows[1], stage);
        const ColumnScales<C, kN> by = scales(stage);
        ring.advance();
        if (more) wait_barrier_watched(shared.full(ring.stage), ring.parity);
        const u32 ahead = more ? ring.stage : stage;
        load(packed[0], ahead, 0), load(packed[1], ahead, 1);
        ptx::wgmma_wait<1>();
        by.promote(result.block[0], fresh[0], unit);
        rows[0].expand(packed[0]);
        ptx::wgmma_wait<0>();
        by.promote(result.block[1], fresh[1], unit);
        rows[1].expand(packed[1]);
        release_stage(shared, stage, place);
    }

    /// From a stage that is full, of which block 0 has been loaded into `rows`, and block 1 if both are loaded at once.
    MEGA_DEVICE void run(Columns<C>& result, Ring<C::kStages> ring, Rows (&rows)[2],
                         const Unit<C>& unit, u32 k_blocks) const {
#pragma unroll
        for (u32 i = 0; i < kN; ++i) result.block[i / (kN / 2)][i % (kN / 2)] = 0;
#pragma unroll 1
        for (; k_blocks != 0; --k_blocks) {
            if constexpr (kAtOnce) at_once(result, rows, ring, unit, k_blocks != 1);
            else in_turn(result, rows, ring, unit, k_blocks != 1);
        }
    }
};

}   // namespace megamoe
