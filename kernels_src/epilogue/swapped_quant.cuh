// Epilogue of GEMM 1 with operands swapped (roles/swapped_math.cuh): computes what epilogue/swiglu_quant.cuh does, from a result whose
// columns are tokens.
//
// Gate and up of an output are in the same thread here too, but the 128 outputs of a token are spread over eight lanes (t/4) of each of
// the eight math warps.  So all math warps meet three times, at the named barrier kBarrierMath: when four numbers of each warp and token,
// the largest of two lanes each, lie in shared memory; when each token's scale has been computed from its 32 numbers; and when the codes
// lie there as rows.
#pragma once
#include "epilogue/quotient.cuh"
#include "epilogue/silu.cuh"
#include "epilogue/staging.cuh"
#include "mma/swapped.cuh"
#include "ptx/convert.cuh"

namespace megamoe {

/// By all math warps.  A token has one row of 128 bytes for its largest magnitudes and then its codes.  Reciprocal scales lie behind all
/// rows: slow warps still read them while fast ones store codes.
///
/// The epilogue is compiled once for all main loops.  Columns that only wider loops have are worked on only if the tile has rows for them, so
/// that a narrow tile takes no longer than with an epilogue of its own.
template <class C> struct SwappedQuant {
    static constexpr u32 kMathThreads = kMathWarps * kWarp,
                         kCodesBytes = C::kBlockM * Staging::kRowBytes;
    static constexpr u32 kShare = C::kBlockM > 64 ? 2 : 4;   // threads that make a token's scale
    static_assert(kShare * C::kBlockM <= kMathThreads, "tokens that have no scale");
    static_assert(kCodesBytes + C::kBlockM * 4 <= kMathWarps * kStagingBytes, "no room to exchange");

    const Params& p;
    const u32 address;   // of all math warps' staging: rows of tokens, reciprocal scales
    u32 thread;          // 0 to 255, of both warpgroups
    u32 pool_row;        // of the tile's first row in the pool
    u32 rows;            // valid rows of the tile, here columns
    u32 n;

    MEGA_DEVICE u32 inverse_at(u32 column) const { return address + kCodesBytes + column * 4; }
    MEGA_DEVICE Staging staging() const { return {address, thread % kWarp}; }

    /// Writes silu(gate) * up over the gate's registers, and largest magnitudes to shared memory.  Of every eight columns a lane has two
    /// tokens.  It leaves one of them to lane ^ 16, and stores for the other the larger number of both lanes: four bytes of the warp's
    /// sixteen in the token's row.
    template <u32 kFirst> MEGA_DEVICE void activate(Columns<C>& result) const {
        constexpr u32 kEnd = C::Policy::wider(kFirst);
        const u32 lane = thread % kWarp, odd = lane / 16;   // odd: which token is left to this lane
        const u32 place = staging().chunk(lane % 4 * 2 + odd, thread / kWarp) + lane / 4 % 4 * 4;
#pragma unroll
        for (u32 first = kFirst; first < kEnd; first += 8) {
            float largest[2];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                float *a = result.block[0] + first / 2 + i, *b = result.block[1] + first / 2 + i;
                a[0] = swiglu<C>(a[0], a[2], p.clamp);
                b[0] = swiglu<C>(b[0], b[2], p.clamp);
                largest[i] = fmaxf(fabsf(a[0]), fabsf(b[0]));
            }
            const float kept = odd ? largest[1] : largest[0], sent = odd ? largest[0] : largest[1];
            const float both = fmaxf(kept, __shfl_xor_sync(~0u, sent, 16));
            ptx::store4_shared(place + first * Staging::kRowBytes, __float_as_uint(both));
        }
        if constexpr (kEnd < C::kBlockM)
            if (rows > kEnd) activate<kEnd>(result);
    }

    /// The scale of each token and its reciprocal, by kShare threads for each token.  A warp has kWarp / kShare tokens, of which the last
    /// may be no rows of the tile; columns of a loop are whole eights or sixteens, so activate has written their numbers too.
    MEGA_DEVICE void make_scale() const {
        const u32 token = thread / kShare, part = thread % kShare;
        if (thread / kWarp * kWarp >= rows * kShare)
            return;   // whole warps: lanes of others exchange
        const u32 mine = staging().chunk(token, part * (8 / kShare));
        float largest = kLeastMagnitude;
#pragma unroll
        for (u32 i = 0; i < 8 / kShare; ++i) {
            float a, b, c, d;
            ptx::load_floats_shared(Staging::beside(mine, i), a, b, c, d);
            largest = fmaxf(largest, fmaxf(fmaxf(a, b), fmaxf(c, d)));
        }
#pragma unroll
        for (u32 mask = 1; mask < kShare; mask *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, mask));
        if (part != 0 || token >= rows) return;
        const float scale = quant_scale(largest);
        ptx::store4_shared(inverse_at(token), __float_as_uint(reciprocal(scale)));
        p.act2_scales[u64(n) * p.pool_rows + pool_row + token] = scale;
    }

    /// Codes to shared memory, as rows of tokens.  A thread has codes of two tokens and two blocks, of one output each, and the warp of
    /// eight outputs.  They are transposed as pairs of codes, one of each block: chunk w of a row has those of math warp w.
    template <u32 kFirst> MEGA_DEVICE void stage_codes(const Columns<C>& result) const {
        constexpr u32 kEnd = C::Policy::wider(kFirst);
        const u32 lane = thread % kWarp;
        u32 codes[(kEnd - kFirst) / 8];
#pragma unroll
        for (u32 first = kFirst; first < kEnd; first += 8) {
            float inverse[2];
            ptx::load_floats_shared(inverse_at(first + lane % 4 * 2), inverse[0], inverse[1]);
            const float *a = result.block[0] + first / 2, *b = result.block[1] + first / 2;
            codes[(first - kFirst) / 8] = ptx::pack_e4m3(a[0], b[0], a[1], b[1], inverse[0],
                                                         inverse[1]);
        }
        ptx::store_matrices_transposed(
            staging().chunk(lane, thread / kWarp) + kFirst * Staging::kRowBytes, codes);
        if constexpr (kEnd < C::kBlockM)
            if (rows > kEnd) stage_codes<kEnd>(result);
    }

    /// Rows of codes to the pool of GEMM 2.  Sixteen outputs of a block, which a thread stores, are every other code of two warps.
    MEGA_DEVICE void store_rows() const {
        // output: a block of 64 rows has 32, of which a warp has 8
        const u32 column = thread % 8, block = column / 2 % 2,
                  warp = column / 4 * 4 + column % 2 * 2;
        const u32 every_other = block == 0 ? 0x6420 : 0x7531;
        const u32 place = staging().chunk(thread / 8, warp);
#pragma unroll
        for (u32 first = 0; first < C::kBlockM; first += kMathThreads / 8) {
            const u32 row = first + thread / 8;
            if (row >= rows) break;
            Vec16 codes;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const Vec16 pairs = ptx::load16_shared(Staging::beside(place, half) +
                                                       first * Staging::kRowBytes);
                codes.w[half * 2] = ptx::choose_bytes(pairs.w[0], pairs.w[1], every_other);
                codes.w[half * 2 + 1] = ptx::choose_bytes(pairs.w[2], pairs.w[3], every_other);
            }
            ptx::store16(p.act2_pool + u64(pool_row + row) * C::kIntermediate + n * kQuantBlock +
                             column * 16,
                         codes);
        }
    }

    /// By all math warps.
    MEGA_DEVICE void run(Columns<C>& result) const {
        activate<0>(result);
        ptx::named_sync(kBarrierMath, kMathThreads);
        make_scale();
        ptx::named_sync(kBarrierMath, kMathThreads);
        stage_codes<0>(result);
        ptx::named_sync(kBarrierMath, kMathThreads);
        store_rows();
        ptx::fence_async_global();   // GEMM 2 reads these rows by TMA
    }
};

}   // namespace megamoe
