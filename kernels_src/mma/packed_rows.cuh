// Packed weights in registers: what one thread of a warpgroup holds of 64 rows of a k-block (formats/mxfp4.cuh has their order).
// Decode and wide make the left operand of a product of it; prefill makes rows of e5m2 of it (expand/unpack.cuh, where what a thread of
// unpack holds stands too).
#pragma once
#include "base/constants.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// The place of a thread's sixteen bytes among those of its warpgroup, and the thread of a place.  So those of all lanes l with the
/// same l % 4, which a helper of unpack reads at once, lie in different banks, like those of eight neighbouring lanes.
MEGA_DEVICE constexpr u32 packed_place(u32 thread) { return thread ^ thread / 8 % 4; }

struct PackedRows {
    Vec16 codes[2];     // of each half of the k-block's depth
    u32 exponents[2];   // of rows t/4 and t/4 + 8: a byte for each 32 of the depth

    /// From a k-block in shared memory, of which these are the addresses; `m`: which 64 rows; `place` of the thread
    /// (packed_place), which shares place / 4 with it.
    MEGA_DEVICE void load(u32 codes_at, u32 exponents_at, u32 m, u32 place) {
        constexpr u32 kHalfBytes = kGroup * 16;   // codes of one half, of all threads
        const u32 from = codes_at + m * (2 * kHalfBytes) + place * 16;
        codes[0] = ptx::load16_shared(from);
        codes[1] = ptx::load16_shared(from + kHalfBytes);
        ptx::load8_shared(exponents_at + m * (64 * kBlockK / kPackedGroup) + place / 4 * 8,
                          exponents[0], exponents[1]);
    }
};

}   // namespace megamoe
