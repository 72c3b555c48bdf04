// Where the time goes.  With `Config::kTimeline` the roles below write a record of each thing they did, with its begin and end;
// without it all of this compiles to nothing.  Who reads the records is no part of the package.
//
// A record has four words of 64 bits: block << 16 | role << 8 | what, index (a tile's, say), begin, end in nanoseconds
// of the device's timer.  Each role of each block has room of its own, so nobody waits for anybody.
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"

namespace megamoe {

/// Who writes records.  The weights lane has no register left for it; its time is about that of the activations lane.
enum class Role : u32 { head = 0, activations = 1, dispatch = 2, publisher = 3 };
// records of a role of a block; later ones are dropped
constexpr u32 kRoles = 4, kRecords = 512, kRecordWords = 4;

// clang-format off
/// What was done.
enum class Span : u32 {
    none = 0,
    count, count_barrier, order, order_barrier, expert_table, first_round,   // head
    wait_rows, stream_activations, gather, gemm1, gemm2, tail_barrier, combine,
    expand,   // at the head, in blocks that do
};
// clang-format on

template <class C> struct Timeline {
    const Params& p;
    const Role role;
    // the low half of the timer, and no address: the lanes that carry this are short of registers
    u32 records = 0, begin = 0;

    MEGA_DEVICE Timeline(const Params& p_, Role role_) : p(p_), role(role_) { start(); }

    /// A span begins now, not where the last one ended.
    MEGA_DEVICE void start() {
        if constexpr (C::kTimeline) begin = static_cast<u32>(ptx::nanoseconds());
    }
    /// The span that began when the last one ended, or at `start`, ends now.
    MEGA_DEVICE void done(Span what, u32 index = 0) {
        if constexpr (C::kTimeline) {
            const u64 end = ptx::nanoseconds();
            const u32 own = blockIdx.x * kRoles + static_cast<u32>(role);
            u64* at = p.timeline + (u64(own) * kRecords + records) * kRecordWords;
            if (records < kRecords) {
                at[0] = blockIdx.x << 16 | static_cast<u32>(role) << 8 | static_cast<u32>(what),
                at[1] = index;
                at[2] = end - (static_cast<u32>(end) - begin), at[3] = end;
                ++records;
            }
            begin = static_cast<u32>(end);
        }
    }
};

}   // namespace megamoe
