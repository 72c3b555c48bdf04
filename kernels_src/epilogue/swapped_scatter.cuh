// Epilogue of GEMM 2 with operands swapped: as epilogue/scatter.cuh, but a token's 64 numbers of a block are spread over
// the four warps of the group, which turn them into rows in the group's part of the staging.
#pragma once
#include "epilogue/scatter.cuh"
#include "epilogue/staging.cuh"
#include "mma/swapped.cuh"

namespace megamoe {

template <class C, u32 kN> struct SwappedScatter {
    // columns that pass through the patch together, of both blocks if there is room for them, else of one: its rows of 128 bytes
    static constexpr u32 kColumns = kN <= 64       ? kN
                                    : kN % 32 == 0 ? 32
                                                   : 16,
                         kTogether = kColumns <= 32 ? 2 : 1, kRows = kTogether * kColumns;
    static constexpr u32 kPasses = kRows / 16;   // each thread of the group moves 16 bytes of a row
    // addresses of rows that a thread has for them; those of the second block are the same again, which many columns leave out
    static constexpr u32 kSlots = kN <= 64 ? kPasses : kColumns / 16;
    static_assert(kN % kColumns == 0 && kRows % 16 == 0 &&
                  kRows * Staging::kRowBytes <= 4 * kStagingBytes);

    const Params& p;
    const u32 address;     // of the group's staging
    u32 group, thread;     // which warpgroup; thread of it
    u32 first_row, rows;   // of the tile; valid ones
    u32 n;
    bool half;   // the tile has 128 columns, and each group one block

    MEGA_DEVICE u32 row(u32 pass) const { return pass * 16 + thread / 8; }
    MEGA_DEVICE u32 token(u32 pass) const { return row(pass) % kColumns; }
    MEGA_DEVICE void meet() const { ptx::named_sync(kBarrierGroup + group, kGroup); }

    /// Tokens of the patch by eights: which block and tokens the i-th are of.
    MEGA_DEVICE void stage(const Columns<kN>& result, u32 first, u32 first_block) const {
        const u32 lane = thread % kWarp, warp = thread / kWarp;
        const Staging staging{address, lane};
#pragma unroll
        for (u32 i = 0; i < kRows / 8; i += 2) {
            const auto at = [&](u32 eight, u32 x) {
                return result.block[first_block + eight / (kColumns / 8)]
                                   [first / 2 + eight % (kColumns / 8) * 4 + x];
            };
            ptx::store_matrix4_bf16_turned(
                staging.chunk((i + lane / 16) * 8 + lane % 8, 2 * warp + lane / 8 % 2), at(i, 0),
                at(i, 1), at(i, 2), at(i, 3), at(i + 1, 0), at(i + 1, 1), at(i + 1, 2),
                at(i + 1, 3));
        }
    }

    MEGA_DEVICE void move(u8* const (&slots)[kSlots], u32 first, u32 first_block) const {
        const Staging staging{address, thread % kWarp};
        const u32 chunk = thread % 8;
#pragma unroll
        for (u32 i = 0; i < kPasses; ++i) {
            const u32 which = first_block + row(i) / kColumns;
            const u32 column = n * kBlockN + (half ? group : group * 2 + which) * 64 + chunk * 8;
            if (first + token(i) < rows && !(half && which != 0))
                ptx::store16(slots[i % kSlots] + column * 2,
                             ptx::load16_shared(staging.chunk(row(i), chunk)));
        }
    }

    MEGA_DEVICE void run(const Columns<kN>& result) const {
        u8* slots[kN / kColumns][kSlots];
#pragma unroll
        for (u32 i = 0; i < kN / kColumns * kSlots; ++i)
            slots[i / kSlots][i % kSlots] = combine_row<C>(
                p, p.row_pairs + first_row +
                       min_u32(i / kSlots * kColumns + token(i % kSlots), rows - 1));
#pragma unroll
        for (u32 i = 0; i < kN / kColumns; ++i)
#pragma unroll
            for (u32 b = 0; b < 2; b += kTogether) {
                if (i + b != 0) meet();
                stage(result, i * kColumns, b);
                meet();
                move(slots[i], i * kColumns, b);
            }
    }
};

}   // namespace megamoe
