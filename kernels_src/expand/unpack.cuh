// From packed weights to a tile of e5m2 codes in shared memory, as the tensor cores read it.
//
// A thread's sixteen bytes hold, of rows r and r + 8, four times eight codes (formats/mxfp4.cuh).  Each eight become four
// bytes in either of two chunks of sixteen; the swizzle puts those of eight rows into different banks, so plain stores of
// four bytes are as fast as shared memory.
#pragma once
#include "base/constants.cuh"
#include "mma/magnitudes.cuh"
#include "ptx/control.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// Where a thread's bytes of chunk 0 of row r lie: `lane` of the warp that has the sixteen rows which begin at `rows`.  Those of chunk
/// c lie at this ^ 16c, those of row r + 8 another 1024 on.
MEGA_DEVICE u32 unpacked_place(u32 rows, u32 lane) {
    return rows + lane / 4 * (kBlockK + 16) + lane % 4 * 4;
}

/// One half of a k-block, of rows r and r + 8, whose groups have these exponents.
template <u32 kHalf>
MEGA_DEVICE void unpack_half(u32 place, const Vec16& codes, const u32 (&exponents)[2]) {
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        const u32 group = 2 * kHalf + j / 2, below = j % 2;
        const Magnitudes table(ptx::choose_bytes(exponents[below], 0, 0x4440 + group));
        u32 first, second;
        ptx::expand_e2m1(codes.w[j], table.low, table.high, first, second);
        ptx::store4_shared((place ^ 32 * group) + below * (8 * kBlockK), first);
        ptx::store4_shared((place ^ (32 * group + 16)) + below * (8 * kBlockK), second);
    }
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
        unpack_half<0>(place, codes[0], exponents);
        unpack_half<1>(place, codes[1], exponents);
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
