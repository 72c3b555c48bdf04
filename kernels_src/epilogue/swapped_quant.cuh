// Epilogue of GEMM 1 with operands swapped (roles/swapped_math.cuh): computes what epilogue/swiglu_quant.cuh does, from a result whose
// columns are tokens.
//
// Gate and up of an output are in the same thread here too, but the 128 outputs of a token are spread over eight lanes (t/4) of each of
// the eight math warps.  So all math warps meet three times, at the named barrier kBarrierMath: when each warp's largest magnitudes lie
// in shared memory, when each token's scale has been computed from them, and when the codes lie there as rows.
#pragma once
#include "epilogue/quotient.cuh"
#include "epilogue/silu.cuh"
#include "epilogue/staging.cuh"
#include "mma/swapped.cuh"
#include "ptx/convert.cuh"

namespace megamoe {

/// For each of a thread's n numbers the largest over the eight lanes with the same t%4, by three exchanges.  In each of these two lanes
/// split the numbers they have, if there are several, and each keeps one half: in the end a lane has the largest of numbers `first` to
/// `first` + `left` - 1, in `numbers[0]` and on.
template <u32 n> struct LargestOfLanes {
    static constexpr u32 left = n > 8 ? n / 8 : 1;
    u32 first = 0;

    MEGA_DEVICE explicit LargestOfLanes(float (&numbers)[n], u32 lane) {
        u32 count = n;
#pragma unroll
        for (u32 step = 0; step < 3; ++step) {
            const u32 mask = 16 >> step;
            const bool upper = lane & mask;
            if (count == 1) {
                numbers[0] = fmaxf(numbers[0], __shfl_xor_sync(~0u, numbers[0], mask));
                continue;
            }
            count /= 2;
#pragma unroll
            for (u32 i = 0; i < n / 2; ++i) {
                if (i >= count) break;
                const float kept = upper ? numbers[i + count] : numbers[i],
                            sent = upper ? numbers[i] : numbers[i + count];
                numbers[i] = fmaxf(kept, __shfl_xor_sync(~0u, sent, mask));
            }
            first += upper ? count : 0;
        }
    }
};

/// By all math warps.  What they exchange lies behind the codes and not in their place: slow warps still read reciprocal scales while
/// fast ones store codes.
///
/// The epilogue is compiled once for all main loops.  Columns that only wider loops have are worked on only if the tile has rows for them, so
/// that a narrow tile takes no longer than with an epilogue of its own.
template <class C> struct SwappedQuant {
    static constexpr u32 kMathThreads = kMathWarps * kWarp,
                         kCodesBytes = C::kBlockM * Staging::kRowBytes;
    static_assert(kCodesBytes + (kMathWarps + 1) * C::kBlockM * 4 <= kMathWarps * kStagingBytes,
                  "no room to exchange");

    const Params& p;
    const u32 address;   // of all math warps' staging: codes, each warp's largest magnitudes, reciprocal scales
    u32 thread;     // 0 to 255, of both warpgroups
    u32 pool_row;   // of the tile's first row in the pool
    u32 rows;       // valid rows of the tile, here columns
    u32 n;

    MEGA_DEVICE u32 largest_at(u32 warp, u32 column) const {
        return address + kCodesBytes + (warp * C::kBlockM + column) * 4;
    }
    MEGA_DEVICE u32 inverse_at(u32 column) const { return largest_at(kMathWarps, column); }

    /// Writes silu(gate) * up over the gate's registers, and the largest magnitudes of this warp to shared memory.
    template <u32 kFirst> MEGA_DEVICE void activate(Columns<C>& result) const {
        constexpr u32 kEnd = C::Policy::wider(kFirst), kNumbers = (kEnd - kFirst) / 4;
        float largest[kNumbers];   // tokens 2i and 2i + 1 of this thread's
        const u32 lane = thread % kWarp;
#pragma unroll
        for (u32 i = 0; i < kNumbers; ++i) {
            largest[i] = 0;
#pragma unroll
            for (u32 b = 0; b < 2; ++b) {
                float* at = result.block[b] + kFirst / 2 + i / 2 * 4 + i % 2;
                float& gate = at[0];
                gate = swiglu<C>(gate, at[2], p.clamp);
                largest[i] = fmaxf(largest[i], fabsf(gate));
            }
        }
        const LargestOfLanes<kNumbers> found(largest, lane);
#pragma unroll
        for (u32 i = 0; i < found.left; ++i) {
            const u32 number = found.first + i,
                      token = kFirst + number / 2 * 8 + lane % 4 * 2 + number % 2;
            ptx::store4_shared(largest_at(thread / kWarp, token), __float_as_uint(largest[i]));
        }
        if constexpr (kEnd < C::kBlockM)
            if (rows > kEnd) activate<kEnd>(result);
    }

    /// The scale of each token and its reciprocal, by a thread for each token.
    MEGA_DEVICE void make_scale() const {
        if (thread >= rows) return;
        float largest = kLeastMagnitude;
#pragma unroll
        for (u32 warp = 0; warp < kMathWarps; ++warp)
            largest = fmaxf(largest, ptx::load_float_shared(largest_at(warp, thread)));
        const float scale = quant_scale(largest);
        ptx::store4_shared(inverse_at(thread), __float_as_uint(reciprocal(scale)));
        p.act2_scales[u64(n) * p.pool_rows + pool_row + thread] = scale;
    }

    /// Codes to shared memory, as rows of tokens.  A thread has codes of two tokens and two blocks, of one output each.  It exchanges them
    /// with lane ^ 4, which leaves it one token, and with lane ^ 8, which leaves it one block: four outputs of a token, side by side.
    template <u32 kFirst> MEGA_DEVICE void stage_codes(const Columns<C>& result) const {
        constexpr u32 kEnd = C::Policy::wider(kFirst);
        const u32 lane = thread % kWarp, group = thread / kGroup, warp = thread / kWarp % 4;
        const bool odd_token = lane & 4, odd_block = lane & 8;
        const Staging staging{address, lane};
#pragma unroll
        for (u32 first = kFirst; first < kEnd; first += 8) {
            float inverse[2];
            ptx::load_floats_shared(inverse_at(first + lane % 4 * 2), inverse[0], inverse[1]);
            const float *a = result.block[0] + first / 2, *b = result.block[1] + first / 2;
            u32 own = ptx::pack_e4m3(a[0] * inverse[0], a[1] * inverse[1], b[0] * inverse[0],
                                     b[1] * inverse[1]);
            u32 other = __shfl_xor_sync(~0u, own, 4);
            own = ptx::choose_bytes(own, other, odd_token ? 0x3715 : 0x6240);
            other = __shfl_xor_sync(~0u, own, 8);
            own = ptx::choose_bytes(own, other, odd_block ? 0x3276 : 0x5410);
            // output: a block of 64 rows has 32, of which a warp has 8
            const u32 token = lane % 4 * 2 + odd_token + first,
                      output = (group * 2 + odd_block) * 32 + warp * 8 + lane / 16 * 4;
            ptx::store4_shared(staging.chunk(token, output / 16) + output % 16, own);
        }
        if constexpr (kEnd < C::kBlockM)
            if (rows > kEnd) stage_codes<kEnd>(result);
    }

    /// Rows of codes to the pool of GEMM 2.
    MEGA_DEVICE void store_rows() const {
        const Staging staging{address, thread % kWarp};
#pragma unroll
        for (u32 first = 0; first < C::kBlockM; first += kMathThreads / 8) {
            const u32 row = first + thread / 8, column = thread % 8;
            if (row < rows)
                ptx::store16(p.act2_pool + u64(pool_row + row) * C::kIntermediate +
                                 n * kQuantBlock + column * 16,
                             ptx::load16_shared(staging.chunk(row, column)));
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
