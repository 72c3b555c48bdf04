// From packed weights to a tile of e5m2 codes in shared memory, as the tensor cores read it.
//
// A thread's sixteen bytes hold, of rows r and r + 8, four times eight codes (formats/mxfp4.cuh).  Each eight become four
// bytes in either of two chunks of sixteen, which is what `stmatrix` has a thread give of two matrices: both chunks of eight rows
// go by one instruction.  (All four of sixteen rows could, but helpers have no registers for them.)  The swizzle puts chunks of
// eight rows into different banks.
#pragma once
#include "base/constants.cuh"
#include "mma/magnitudes.cuh"
#include "mma/packed_rows.cuh"
#include "ptx/control.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// Where `lane` of the warp that has the sixteen rows which begin at `rows` stores: chunk 0 or 1 of one of the first eight.  Those of
/// chunks c and c + 1 lie at this ^ 16c.
MEGA_DEVICE u32 unpacked_place(u32 rows, u32 lane) {
    return rows + lane % 8 * kBlockK + (lane / 8 % 2 ^ lane % 8) * 16;
}

/// 32 of the depth, of rows r and r + 8, whose groups have these exponents; `place` is theirs.
template <u32 kQuarter>
MEGA_DEVICE void unpack_quarter(u32 place, const Vec16& codes, const u32 (&exponents)[2]) {
#pragma unroll
    for (u32 below = 0; below < 2; ++below) {
        const Magnitudes table(ptx::choose_bytes(exponents[below], 0, 0x4440 + kQuarter));
        u32 first, second;
        ptx::expand_e2m1(codes.w[kQuarter % 2 * 2 + below], table.low, table.high, first, second);
        ptx::store_matrix2(place + below * (8 * kBlockK), first, second);
    }
}

/// The sixteen rows that a warp holds, to its `unpacked_place`.
MEGA_DEVICE void unpack_rows(u32 place, const PackedRows& rows) {
    unpack_quarter<0>(place, rows.codes[0], rows.exponents);
    unpack_quarter<1>(place ^ 32, rows.codes[0], rows.exponents);
    unpack_quarter<2>(place ^ 64, rows.codes[1], rows.exponents);
    unpack_quarter<3>(place ^ 96, rows.codes[1], rows.exponents);
}

/// 64 rows of a k-block, by one warp: sixteen at a time, as if it were each of a warpgroup's four warps in turn.
struct PackedPiece {
    static constexpr u32 kRows = 64, kCodeBytes = kRows * kBlockK / 2,
                         kExponentBytes = kRows * kBlockK / 32, kBytes = kRows * kBlockK;
    PackedRows rows[4];

    /// From memory.
    MEGA_DEVICE void load(const u8* codes, const u8* exponents) {
        const u32 lane = ptx::lane_id();
#pragma unroll
        for (u32 w = 0; w < 4; ++w) {
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                rows[w].codes[h] = ptx::load16(codes + (h * kGroup + w * kWarp + lane) * 16);
            ptx::load8(exponents + w * 64 + lane / 4 * 8, rows[w].exponents[0],
                       rows[w].exponents[1]);
        }
    }
    /// To 64 rows of 128 bytes in shared memory, from address `tile` on.
    MEGA_DEVICE void expand(u32 tile) const {
#pragma unroll
        for (u32 w = 0; w < 4; ++w)
            unpack_rows(unpacked_place(tile + w * 16 * kBlockK, ptx::lane_id()), rows[w]);
    }
};

}   // namespace megamoe
