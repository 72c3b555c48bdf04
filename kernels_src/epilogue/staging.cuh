// Between registers and global memory lies a patch of 16 rows x 128 bytes per math warp, private to the warp: fragments
// go in, whole 16-byte chunks come out, eight lanes to a row, so that every global store fills 128-byte lines.
// A chunk lies at chunk ^ (row % 8): no bank conflicts either way, and no barrier wider than the warp.
#pragma once
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

struct Staging {
    static constexpr u32 kRowBytes = 128, kPasses = 4, kRowsPerPass = 4;
    u32 address;

    MEGA_DEVICE u32 chunk(u32 row, u32 c) const { return address + row * kRowBytes + (c ^ row % 8) * 16; }

    /// Row and chunk that this lane reads back in pass i of 4.
    MEGA_DEVICE static u32 row(u32 pass) { return pass * kRowsPerPass + ptx::lane_id() / 8; }
    MEGA_DEVICE static u32 column() { return ptx::lane_id() % 8; }
    MEGA_DEVICE Vec16 read(u32 pass) const { return ptx::load16_shared(chunk(row(pass), column())); }
};

}  // namespace megamoe
