// Epilogue of GEMM 2: bf16 rows go back to the rank that holds their token, into the slot of their (token, slot) pair.
// No two rows share a slot, so there are no atomics and the sum taken later has one order.
#pragma once
#include "epilogue/staging.cuh"
#include "mma/block_scaled.cuh"

namespace megamoe {

/// Where the result of a row goes that came from `origin`, a word of `row_pairs`: column 0 of its slot, at the rank that holds
/// its token.
template <class C> MEGA_DEVICE u8* combine_row(const Params& p, u32 origin) {
    const u32 rank = C::kRanks == 1 ? 0 : origin >> kPairBits, pair = origin & kPairMask;
    return symmetric<u8>(p, rank, p.combine) + u64(pair) * (C::kHidden * 2);
}

template <class C> struct Scatter {
    const Params& p;
    const Staging staging;
    u32 first_row;   // of this warp's 16
    u32 rows;        // valid rows from there to the end of the tile; 16 or more: all of this warp's
    u32 n;

    /// Address of column 0 of the row that this lane writes in pass i; of the last valid one when there is none.  It is
    /// never null: whether there is a row is asked of `rows` each time, since ptxas (CUDA 13.0) was seen to schedule the
    /// comparison of a pointer that is null or computed one cycle too early.
    MEGA_DEVICE u8* slot(u32 pass) const {
        return combine_row<C>(
            p, ptx::load_l2(p.row_pairs + first_row + min_u32(staging.row(pass), rows - 1)));
    }

    MEGA_DEVICE void stage_quarter(const float (&d)[32]) const {
        const u32 lane = staging.lane;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {   // 16 columns: two groups of eight, rows t/4 and t/4 + 8
            const u32 i = j * 8;
            ptx::store_matrix4_bf16(staging.chunk(lane % 16, 2 * j + lane / 16), d[i], d[i + 1],
                                    d[i + 2], d[i + 3], d[i + 4], d[i + 5], d[i + 6], d[i + 7]);
        }
    }

    MEGA_DEVICE void run(const Result& result) const {
        u8* slots[Staging::kPasses];
#pragma unroll
        for (u32 i = 0; i < Staging::kPasses; ++i) slots[i] = slot(i);
#pragma unroll
        for (u32 q = 0; q < 4; ++q) {
            const u32 column = n * kBlockN + q * 64;
            // the last tile may be half as wide
            if (C::kHidden % kBlockN != 0 && column >= C::kHidden) return;
            stage_quarter(result.quarter[q]);
            __syncwarp();
            Vec16 v[Staging::kPasses];
            staging.read_all(v);
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < Staging::kPasses; ++i)
                if (staging.row(i) < rows)
                    ptx::store16(slots[i] + column * 2 + staging.column() * 16, v[i]);
        }
    }
};

}   // namespace megamoe
