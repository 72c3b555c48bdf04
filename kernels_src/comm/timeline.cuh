// Where the time goes.  With `Config::kTimeline` every role of every block writes down what it did from when to when;
// without it all of this compiles to nothing.  `megamoe_jit/_timeline.py` turns the records into a trace.
//
// A record has four words of 64 bits: block << 16 | role << 8 | what, index (a tile's, say), begin, end in nanoseconds
// of the device's timer.  Each role of each block has room of its own, so nobody waits for anybody.
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"

namespace megamoe {

/// Who writes: the producer warps by number, and the head.
enum class Role : u32 { activations = 0, weights = 1, dispatch = 2, publisher = 3, head = 4 };
constexpr u32 kRoles = 5, kRecords = 512, kRecordWords = 4;   // records of a role of a block; later ones are dropped

/// What was done.
enum class Span : u32 {
    none = 0,
    count, count_barrier, order, order_barrier, plan, first_round,   // head
    wait_rows, stream_activations, stream_weights, gather, gemm1, gemm2, tail_barrier, combine,
};

template <class C> struct Timeline {
    u64* next;
    u64 begin;
    u32 left, who;

    MEGA_DEVICE Timeline(const Params& p, Role role) {
        if constexpr (C::kTimeline) {
            who = blockIdx.x << 16 | static_cast<u32>(role) << 8, left = kRecords;
            next = p.timeline + (blockIdx.x * kRoles + static_cast<u32>(role)) * u64(kRecords * kRecordWords);
            begin = ptx::nanoseconds();
        }
    }
    /// What went before was something else: a span begins now.
    MEGA_DEVICE void start() {
        if constexpr (C::kTimeline) begin = ptx::nanoseconds();
    }
    /// The span that began when the last one ended, or at `start`, ends now.
    MEGA_DEVICE void done(Span what, u32 index = 0) {
        if constexpr (C::kTimeline) {
            const u64 end = ptx::nanoseconds();
            if (left > 0) next[0] = who | static_cast<u32>(what), next[1] = index, next[2] = begin, next[3] = end, next += kRecordWords, --left;
            begin = end;
        }
    }
};

}  // namespace megamoe
