// From packed weights to rows of e5m2 in shared memory, swizzled as the tensor cores read them.
//
// Prefill (expand/ahead.cuh) reads them from memory, sixteen bytes a lane, as they lie (PackedPiece).  These hold four groups of eight
// codes, of rows r and r + 8 (formats/mxfp4.cuh).  Eight codes become four bytes in each of two neighbouring chunks of sixteen bytes,
// which is just what a lane passes to `stmatrix` for two matrices: one instruction stores two chunks of eight rows.
//
// Unpack (expand/beside.cuh) has them in shared memory, where a lane may read four words from as many places at the price of one of
// sixteen bytes.  So it takes all 32 codes that share an exponent, of one row and of the eighth below (PackedGroups): one table of
// magnitudes serves four times as many, and both chunks are stored whole.
#pragma once
#include "base/constants.cuh"
#include "mma/magnitudes.cuh"
#include "mma/packed_rows.cuh"
#include "ptx/control.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// The address that `lane` passes to `stmatrix` for the sixteen rows at address `rows`: lanes 0-7 chunk 0 of the first eight, lanes 8-15
/// chunk 1.  For chunks c and c + 1, c even, it is this ^ 16c.
MEGA_DEVICE u32 unpacked_place(u32 rows, u32 lane) {
    return rows + lane % 8 * kBlockK + (lane / 8 % 2 ^ lane % 8) * 16;
}

/// Unpacks a quarter of the depth, 32 codes of each row, to chunks 2 * kQuarter and the next; `place` is their address.
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

/// Unpacks the sixteen rows that a warp holds; `place`: unpacked_place.
MEGA_DEVICE void unpack_rows(u32 place, const PackedRows& rows) {
    unpack_quarter<0>(place, rows.codes[0], rows.exponents);
    unpack_quarter<1>(place ^ 32, rows.codes[0], rows.exponents);
    unpack_quarter<2>(place ^ 64, rows.codes[1], rows.exponents);
    unpack_quarter<3>(place ^ 96, rows.codes[1], rows.exponents);
}

/// 64 rows of a k-block, by one warp: sixteen at a time, as if it were each of a warpgroup's four warps in turn.
struct PackedPiece {
    static constexpr u32 kRows = 64, kCodeBytes = kRows * kBlockK * kPackedBits / 8,
                         kExponentBytes = kRows * kBlockK / kPackedGroup, kBytes = kRows * kBlockK;
    PackedRows rows[4];

    /// From memory.
    MEGA_DEVICE void load(const u8* codes, const u8* exponents) {
        const u32 place = packed_place(ptx::lane_id());
#pragma unroll
        for (u32 w = 0; w < 4; ++w) {
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                rows[w].codes[h] = ptx::load16(codes + (h * kGroup + w * kWarp + place) * 16);
            ptx::load8(exponents + w * 64 + place / 4 * 8, rows[w].exponents[0],
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

/// Of a warp's sixteen of 64 rows, all 32 codes of a lane's group in row r and in row r + 8, where r = lane % 8.
struct PackedGroups {
    u32 codes[2][4], exponents[2];   // of both rows

    /// Where a thread's are in a k-block, and where they go in a stage, in bytes from their beginnings.  Kept, not made for each: what is
    /// added to them is the same for all threads, and costs no instruction then.
    struct Offsets {
        u32 codes[4], exponents, chunks[2];

        MEGA_DEVICE explicit Offsets(u32 thread) {
            const u32 warp = thread / kWarp, row = thread % 8, group = thread % kWarp / 8;
#pragma unroll
            for (u32 q = 0; q < 4; ++q) {
                codes[q] = group / 2 * (kGroup * 16) +
                           (warp * kWarp + packed_place(row * 4 + q)) * 16 + group % 2 * 8;
                ptx::pin(codes[q]);
            }
            exponents = warp * 64 + row * 8 + group;
            ptx::pin(exponents);
            chunks[0] = warp * (16 * kBlockK) + row * kBlockK + (2 * group ^ row) * 16;
            chunks[1] = chunks[0] ^ 16;
            ptx::pin(chunks[0]), ptx::pin(chunks[1]);
        }
    };

    /// From a k-block in shared memory, of which these are the addresses; `m`: which 64 rows.
    MEGA_DEVICE void load(u32 codes_at, u32 exponents_at, u32 m, const Offsets& offsets) {
#pragma unroll
        for (u32 q = 0; q < 4; ++q)   // those of both rows lie side by side
            ptx::load8_shared(codes_at + offsets.codes[q] + m * PackedPiece::kCodeBytes,
                              codes[0][q], codes[1][q]);
#pragma unroll
        for (u32 below = 0; below < 2; ++below)
            exponents[below] = ptx::load1_shared(exponents_at + offsets.exponents +
                                                 m * PackedPiece::kExponentBytes + below * 4);
    }
    /// Expands those of row r, or with `below` of row r + 8, to their two chunks of the 256 rows at address `rows`.
    MEGA_DEVICE void store_row(u32 rows, u32 m, const Offsets& offsets, u32 below) const {
        const u32 further = m * PackedPiece::kBytes + below * (8 * kBlockK);
        Vec16 first, second;
        ptx::expand_e2m1<Magnitudes>(first, second, codes[below], exponents[below]);
        ptx::store16_shared(rows + offsets.chunks[0] + further, first);
        ptx::store16_shared(rows + offsets.chunks[1] + further, second);
    }
};

}   // namespace megamoe
