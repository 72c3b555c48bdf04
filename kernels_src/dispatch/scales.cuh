// Scales of rows on their way from [token][k-block], in the memory of the row's rank, to [k-block][row] of the pool.  Used by
// dispatch/gather.cuh for the head (RowScales) and by dispatch/pull.cuh (Scales).
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// One row's scales from this rank's own memory, by a warp: one k-block for each lane, and so on.
template <class C> struct OwnRowScales {
    static constexpr u32 kBlocks = C::kHidden / kQuantBlock, kHeld = ceil_div(kBlocks, kWarp);
    float s[kHeld];

    MEGA_DEVICE explicit OwnRowScales(const float* row) {
        const u32 lane = ptx::lane_id();
#pragma unroll
        for (u32 i = 0; i < kHeld; ++i)
            if (lane + i * kWarp < kBlocks) s[i] = ptx::load_l2(row + lane + i * kWarp);
    }
    MEGA_DEVICE void store(const Params& p, u32 pool_row) const {
        const u32 lane = ptx::lane_id();
#pragma unroll
        for (u32 i = 0; i < kHeld; ++i)
            if (lane + i * kWarp < kBlocks)
                p.act1_scales[u64(lane + i * kWarp) * p.pool_rows + pool_row] = s[i];
    }
};

/// Scales of 1 << `shift` rows at once, maybe of other ranks, by a warp: in vectors of four, which are requested before they are
/// needed.  Lane l works on row l % rows.  The first kHeld vectors of a lane wait in registers; `store` loads the others.
template <class C> struct Scales {
    static constexpr u32 kBlocks = C::kHidden / kQuantBlock;
    // else a row begins in the middle of a vector
    static constexpr bool kAligned = kBlocks % 4 == 0;
    // that a row may touch
    static constexpr u32 kVectors = kAligned ? kBlocks / 4 : (kBlocks + 6) / 4;
    static constexpr u32 kMostRows = 8, kMostVectors = kMostRows * kVectors;
    // beside helpers there are fewer registers, and `skew` takes some
    static constexpr u32 kRoom = kHasHelpers<C> && !kAligned ? 2 : 4;
    static constexpr u32 kHeld = min_u32(kRoom, ceil_div(kMostVectors, kWarp));

    u32 shift, skew = 0;   // skew: how many scales of the row before are in this row's first vector
    const u8* from = nullptr;   // that vector; null: this lane has no row
    Vec16 v[kHeld];

    MEGA_DEVICE explicit Scales(u32 shift_) : shift(shift_) {}

    MEGA_DEVICE u32 step() const { return kWarp >> shift; }   // lanes that share a row
    MEGA_DEVICE u32 vector(u32 first, u32 i) const {
        return first + i * step() + (ptx::lane_id() >> shift);
    }

    /// Starts the first loads; `row` is where the scales of this lane's row begin, null if it has none.
    MEGA_DEVICE void request(const float* row) {
        skew = kAligned ? 0 : static_cast<u32>(reinterpret_cast<u64>(row)) / 4 % 4;
        from = reinterpret_cast<const u8*>(row) - skew * 4;
        if (row == nullptr) from = nullptr;
        load(0);
    }
    MEGA_DEVICE void load(u32 first) {
#pragma unroll
        for (u32 i = 0; i < kHeld; ++i)
            if (from != nullptr && vector(first, i) * 4 < kBlocks + skew)
                v[i] = ptx::load16(from + vector(first, i) * 16);
    }
    /// Stores all of them, the row of lane l at `pool_row` + l % rows.
    MEGA_DEVICE void store(const Params& p, u32 pool_row) {
        const u32 row = pool_row + ptx::lane_id() % (1u << shift);
#pragma unroll 1
        for (u32 first = 0; first < kVectors; first += kHeld * step()) {
            if (first > 0) load(first);
#pragma unroll
            for (u32 i = 0; i < kHeld; ++i) {
                if (from == nullptr || vector(first, i) >= kVectors) continue;
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    const u32 block = vector(first, i) * 4 + j - skew;
                    if (kAligned || block < kBlocks)
                        p.act1_scales[u64(block) * p.pool_rows + row] = __uint_as_float(v[i].w[j]);
                }
            }
        }
    }
};

/// One row's scales by a warp: of this rank alone, or of any.
template <class C, bool kOwn = C::kRanks == 1> struct RowScales : OwnRowScales<C> {
    using OwnRowScales<C>::OwnRowScales;
};
template <class C> struct RowScales<C, false> : Scales<C> {
    MEGA_DEVICE explicit RowScales(const float* row) : Scales<C>(0) { this->request(row); }
};

}   // namespace megamoe
