// From packed weights to a tile of e5m2 codes in shared memory, as the tensor cores read it.
//
// A thread's sixteen bytes hold, of rows r and r + 8, four times eight codes (formats/mxfp4.cuh).  Each eight become four
// bytes in either of two chunks of sixteen, which is what `stmatrix` has a thread give of two matrices: four of them, both chunks of
// sixteen rows, go by one instruction.  The swizzle puts chunks of eight rows into different banks.
#pragma once
#include "base/constants.cuh"
#include "mma/magnitudes.cuh"
#include "ptx/control.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// Where `lane` of the warp that has the sixteen rows which begin at `rows` stores: chunk 0 or 1 of one of them.  Those of two
/// chunks c and c + 1 lie at this ^ 16c.
MEGA_DEVICE u32 unpacked_place(u32 rows, u32 lane) {
    return rows + lane / 16 * (8 * kBlockK) + lane % 8 * kBlockK + (lane / 8 % 2 ^ lane % 8) * 16;
}

/// 32 of the depth, of rows r and r + 8, whose groups have these exponents; `place` is theirs.
template <u32 kQuarter>
MEGA_DEVICE void unpack_quarter(u32 place, const Vec16& codes, const u32 (&exponents)[2]) {
    u32 made[2][2];
#pragma unroll
    for (u32 below = 0; below < 2; ++below) {
        const Magnitudes table(ptx::choose_bytes(exponents[below], 0, 0x4440 + kQuarter));
        ptx::expand_e2m1(codes.w[kQuarter % 2 * 2 + below], table.low, table.high, made[below][0],
                         made[below][1]);
    }
    ptx::store_matrix4(place, made[0][0], made[0][1], made[1][0], made[1][1]);
}

/// What a warp has in registers of sixteen rows of a piece, on their way.
struct PackedRows {
    Vec16 codes[2];   // of either half of the k-block
    u32 exponents[2];

    /// `w`: which sixteen.
    MEGA_DEVICE void load(const u8* piece, const u8* piece_exponents, u32 w) {
        const u32 lane = ptx::lane_id();
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
            codes[h] = ptx::load16(piece + (h * kGroup + w * kWarp + lane) * 16);
        ptx::load8(piece_exponents + w * 64 + lane / 4 * 8, exponents[0], exponents[1]);
    }
    MEGA_DEVICE void expand(u32 tile, u32 w) const {
        const u32 place = unpacked_place(tile + w * 16 * kBlockK, ptx::lane_id());
        unpack_quarter<0>(place, codes[0], exponents);
        unpack_quarter<1>(place ^ 32, codes[0], exponents);
        unpack_quarter<2>(place ^ 64, codes[1], exponents);
        unpack_quarter<3>(place ^ 96, codes[1], exponents);
    }
};

/// 64 rows of a k-block.
struct PackedPiece {
    static constexpr u32 kRows = 64, kCodeBytes = kRows * kBlockK / 2,
                         kExponentBytes = kRows * kBlockK / 32, kBytes = kRows * kBlockK;
    PackedRows rows[4];

    MEGA_DEVICE void load(const u8* from, const u8* from_exponents) {
#pragma unroll
        for (u32 w = 0; w < 4; ++w) rows[w].load(from, from_exponents, w);
    }
    MEGA_DEVICE void expand(u32 tile) const {
#pragma unroll
        for (u32 w = 0; w < 4; ++w) rows[w].expand(tile, w);
    }
};

}   // namespace megamoe
