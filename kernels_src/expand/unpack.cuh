// From packed weights in registers to rows of e5m2 in shared memory, swizzled as the tensor cores read them.  Used by prefill
// (expand/ahead.cuh, PackedPiece) and unpack (expand/beside.cuh, unpack_rows).
//
// A thread's sixteen bytes of one half of the depth hold four groups of eight codes, of rows r and r + 8 (formats/mxfp4.cuh).  Eight
// codes become four bytes in each of two neighbouring chunks of sixteen bytes, which is just what a thread passes to `stmatrix` for
// two matrices: one instruction stores two chunks of eight rows, or with those of rows r + 8 four of sixteen.  The latter takes more
// registers.  The swizzle puts the chunks of eight rows into different banks.
#pragma once
#include "base/constants.cuh"
#include "mma/magnitudes.cuh"
#include "mma/packed_rows.cuh"
#include "ptx/control.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// The address that `lane` passes to `stmatrix` of kMatrices for the sixteen rows at address `rows`: lanes 0-7 chunk 0 of the first
/// eight, lanes 8-15 chunk 1, and of four matrices lanes 16-31 the same of the others.  For chunks c and c + 1, c even, it is this ^ 16c.
template <u32 kMatrices> MEGA_DEVICE u32 unpacked_place(u32 rows, u32 lane) {
    const u32 row = (kMatrices == 4 ? lane / 16 * 8 : 0) + lane % 8;
    return rows + row * kBlockK + (lane / 8 % 2 ^ lane % 8) * 16;
}

/// Unpacks a quarter of the depth, 32 codes of each row, to chunks 2 * kQuarter and the next, by `stmatrix` of kMatrices; `place` is
/// their address.
template <u32 kQuarter, u32 kMatrices>
MEGA_DEVICE void unpack_quarter(u32 place, const Vec16& codes, const u32 (&exponents)[2]) {
    static_assert(kMatrices == 2 || kMatrices == 4, "of eight rows or sixteen");
    u32 chunk[2][2];   // of rows r, r + 8
#pragma unroll
    for (u32 below = 0; below < 2; ++below) {
        const Magnitudes table(ptx::choose_bytes(exponents[below], 0, 0x4440 + kQuarter));
        u32(&own)[2] = chunk[below];
        ptx::expand_e2m1(codes.w[kQuarter % 2 * 2 + below], table.low, table.high, own[0], own[1]);
        if (kMatrices == 2) ptx::store_matrix2(place + below * (8 * kBlockK), own[0], own[1]);
    }
    if (kMatrices == 4)
        ptx::store_matrix4(place, chunk[0][0], chunk[0][1], chunk[1][0], chunk[1][1]);
}

/// Unpacks the sixteen rows that a warp holds; `place`: unpacked_place.
template <u32 kMatrices> MEGA_DEVICE void unpack_rows(u32 place, const PackedRows& rows) {
    unpack_quarter<0, kMatrices>(place, rows.codes[0], rows.exponents);
    unpack_quarter<1, kMatrices>(place ^ 32, rows.codes[0], rows.exponents);
    unpack_quarter<2, kMatrices>(place ^ 64, rows.codes[1], rows.exponents);
    unpack_quarter<3, kMatrices>(place ^ 96, rows.codes[1], rows.exponents);
}

/// 64 rows of a k-block, by one warp: sixteen at a time, as if it were each of a warpgroup's four warps in turn.
struct PackedPiece {
    static constexpr u32 kRows = 64, kCodeBytes = kRows * kBlockK * kPackedBits / 8,
                         kExponentBytes = kRows * kBlockK / kPackedGroup, kBytes = kRows * kBlockK;
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
    template <u32 kMatrices> MEGA_DEVICE void expand(u32 tile) const {
#pragma unroll
        for (u32 w = 0; w < 4; ++w)
            unpack_rows<kMatrices>(
                unpacked_place<kMatrices>(tile + w * 16 * kBlockK, ptx::lane_id()), rows[w]);
    }
};

}   // namespace megamoe
