// Between registers and global memory lies a patch of 16 rows x 128 bytes per math warp, private to the warp: fragments
// go in, whole 16-byte chunks come out, eight lanes to a row, so that every global store fills 128-byte lines.
// A chunk lies at chunk ^ (row % 8): no bank conflicts either way, and no barrier wider than the warp.
#pragma once
#include "ptx/memory.cuh"

namespace megamoe {

struct Staging {
    static constexpr u32 kRowBytes = 128, kPasses = 4, kRowsPerPass = 4;
    u32 address, lane;

    MEGA_DEVICE u32 chunk(u32 row, u32 c) const {
        return address + row * kRowBytes + (c ^ row % 8) * 16;
    }

    /// Row and chunk that this lane reads back in pass i of 4.
    MEGA_DEVICE u32 row(u32 pass) const { return pass * kRowsPerPass + lane / 8; }
    MEGA_DEVICE u32 column() const { return lane % 8; }
    /// All passes at once: one after another, each would wait for shared memory anew.
    MEGA_DEVICE void read_all(Vec16 (&v)[kPasses]) const {
#pragma unroll
        for (u32 i = 0; i < kPasses; ++i) v[i] = ptx::load16_shared(chunk(row(i), column()));
    }
};

}   // namespace megamoe
