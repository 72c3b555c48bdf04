// The staging patch of a math warp, between registers and global memory: 16 rows x 128 bytes of shared memory.  Fragments of WGMMA's
// result go in; whole chunks of 16 bytes come out, eight lanes to a row, so that global stores fill whole 128-byte lines.  Chunk c of a
// row lies at c ^ (row % 8), so there are no bank conflicts either way.  Only its own warp uses a patch, so `__syncwarp` orders it; with
// operands swapped several warps use theirs as one, and meet at named barriers.
#pragma once
#include "base/constants.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

struct Staging {
    static constexpr u32 kRowBytes = 128, kPasses = 4, kRowsPerPass = 4;
    static_assert(kPasses * kRowsPerPass * kRowBytes == kStagingBytes, "a patch has 16 rows");
    u32 address, lane;

    /// Address of chunk `c` of a row.
    MEGA_DEVICE u32 chunk(u32 row, u32 c) const {
        return address + row * kRowBytes + (c ^ row % 8) * 16;
    }

    /// Address of chunk c + i of a row from that of chunk c, where c is a multiple of a power of two that is larger than i.  (Rows eight
    /// apart have their chunks in the same order, so 8 kRowBytes further lies the same chunk of the row eight further.)
    MEGA_DEVICE static u32 beside(u32 at, u32 i) { return at ^ i * 16; }

    /// Row and chunk that this lane reads back in pass i of 4.
    MEGA_DEVICE u32 row(u32 pass) const { return pass * kRowsPerPass + lane / 8; }
    MEGA_DEVICE u32 column() const { return lane % 8; }
    /// Loads all passes at once: one after the other, each would wait for shared memory.
    MEGA_DEVICE void read_all(Vec16 (&v)[kPasses]) const {
#pragma unroll
        for (u32 i = 0; i < kPasses; ++i) v[i] = ptx::load16_shared(chunk(row(i), column()));
    }
};

}   // namespace megamoe
