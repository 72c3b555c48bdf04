// Epilogue of GEMM 2 with operands swapped (roles/swapped_math.cuh): does what epilogue/scatter.cuh does.  Here a token's 64 numbers of a
// block are spread over the four warps of a warpgroup, so these use their four staging patches as one, transpose the result into it, and
// meet at the named barrier kBarrierGroup + group: when 32 tokens are staged, and before the next 32 overwrite them.
#pragma once
#include "epilogue/scatter.cuh"
#include "epilogue/staging.cuh"
#include "mma/swapped.cuh"

namespace megamoe {

template <class C> struct SwappedScatter {
    // columns (tokens) that are staged together; of each sixteen of them a thread moves 16 bytes of each block
    static constexpr u32 kColumns = 32;
    using Origins = u32[C::kBlockM / 16];   // of the rows of this thread's tokens
    static_assert(2 * kColumns * Staging::kRowBytes <= 4 * kStagingBytes);

    const Params& p;
    const u32 address;     // of the group's staging
    u32 group, thread;     // which warpgroup; thread of it
    u32 first_row, rows;   // of the tile; how many are valid
    u32 n;
    bool half;   // a half tile: 128 weight rows, and one block for each warpgroup

    MEGA_DEVICE void meet() const { ptx::named_sync(kBarrierGroup + group, kGroup); }
    /// The patch row at which the sixteen columns of a block begin that `column` is the first of.
    MEGA_DEVICE static constexpr u32 patch_row(u32 column, u32 block) {
        return column % kColumns * 2 + block * 16;
    }

    /// Transposes up to 32 columns from `first` on into the patch, sixteen at a time.
    MEGA_DEVICE void stage(const Columns<C>& result, u32 first) const {
        const u32 lane = thread % kWarp, warp = thread / kWarp;
        const Staging staging{address, lane};
#pragma unroll
        for (u32 column = first; column < first + kColumns && column < C::kBlockM; column += 16) {
            if (column != first && rows <= column) break;
#pragma unroll
            for (u32 b = 0; b < 2; ++b) {
                const float* at = result.block[b] + column / 2;
                ptx::store_matrix4_bf16_transposed(
                    staging.chunk(patch_row(column, b) + lane / 16 * 8 + lane % 8,
                                  2 * warp + lane / 8 % 2),
                    at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]);
            }
        }
    }

    /// Stores them to the combine slots.
    MEGA_DEVICE void move(const Origins& origins, u32 first) const {
        const Staging staging{address, thread % kWarp};
        const u32 chunk = thread % 8;
#pragma unroll
        for (u32 i = 0; i < kColumns / 8; ++i) {
            const u32 column = first + i / 2 * 16, b = i % 2;
            if (column >= C::kBlockM) break;
            const u32 output = n * kBlockN + (half ? group : group * 2 + b) * 64 + chunk * 8;
            if (column + thread / 8 < rows && !(half && b != 0))
                ptx::store16(
                    combine_row<C>(p, origins[column / 16]) + output * 2,
                    ptx::load16_shared(staging.chunk(patch_row(column, b) + thread / 8, chunk)));
        }
    }

    MEGA_DEVICE void run(const Columns<C>& result) const {
        Origins origins;   // all loaded at once: one after the other each would take as long as all
#pragma unroll
        for (u32 i = 0; i < C::kBlockM / 16; ++i)
            origins[i] = ptx::load_l2(p.row_pairs + first_row +
                                      min_u32(i * 16 + thread / 8, rows - 1));
#pragma unroll
        for (u32 first = 0; first < C::kBlockM; first += kColumns) {
            if (first != 0) {
                if (rows <= first) return;
                meet();
            }
            stage(result, first);
            meet();
            move(origins, first);
        }
    }
};

}   // namespace megamoe
