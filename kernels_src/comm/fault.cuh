// Waits with a deadline.  The first thread whose wait passes its deadline stores a record of four words in host memory and ends
// the launch; Python turns the record into a sentence (`megamoe_jit/_device/fault.py`).  Every wait of a producer warp for
// another warp, block or rank goes through `wait_until`.
//
// The launch ends, and the CUDA context with it, by a store to address 0.  `trap` would be the plain way, but where several
// processes share a GPU the driver loses some traps (12 of 71 on an H100, driver 580), and then the host waits for ever.  Of such
// stores it lost none of 213, and it reports them after 0.1 s instead of 2.
//
// Producer warps read the nanosecond timer.  The math warps cannot: a timer, or even a counter with a report, makes ptxas spill in
// their main loop.  They, and helpers, wait by `wait_barrier_watched`, without a deadline; the publisher warp of the same block
// waits with one for every tile that they compute (roles/publish.cuh).  There is no printf and no function that is not inlined:
// either would make ptxas serialise every WGMMA (C7510).
#pragma once
#include "layout/params.cuh"
#include "ptx/control.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// What was waited for.  `megamoe_jit/_device/fault.py` has a sentence for each.
enum class Wait : u32 {
    head_barrier = 1,
    tile_slot_free = 2,
    tile_published = 3,
    stage_free = 4,   // by the activations lane
    row_loaded = 5,
    rows_dispatched = 6,
    gemm1_done = 7,
    gemm1_tile_stored = 8,
    peer_signal = 9,
    tail_barrier = 10,
    weight_stage_free = 11,   // by the weights lane, which runs ahead of the activations
    gemm2_tile_stored = 12,
    pool_read = 13,    // pools as rings: GEMM 1 has read the rows that dispatch is to overwrite
    gemm2_done = 14,   // pools as rings: GEMM 2 has read the rows that GEMM 1 is to overwrite
    weights_expanded = 15,
};

/// Never returns.  Words of the record: what | warp << 8 | block << 16, which one, expected, seen.  A fifth word is taken by the
/// first thread that gives up; the others write nothing and sleep until the context is gone, since they are mostly its victims.
MEGA_DEVICE void give_up(const Params& p, Wait what, u32 which, u32 expected, u32 seen) {
    const u32 who = static_cast<u32>(what) | (threadIdx.x / kWarp) << 8 | blockIdx.x << 16;
    asm volatile(
        "{\n"
        ".reg .u32 taken;\n"
        ".reg .pred first;\n"
        ".reg .u64 nowhere;\n"
        "atom.relaxed.gpu.global.exch.b32 taken, [%0 + 16], 1;\n"
        "setp.eq.u32 first, taken, 0;\n"
        "@first st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};\n"
        "@first fence.acq_rel.sys;\n"
        "mov.u64 nowhere, 0;\n"
        "@first st.volatile.global.u32 [nowhere], %1;\n"
        "sleep: nanosleep.u32 1000000;\n"
        "bra sleep;\n"
        "}" ::"l"(p.fault),
        "r"(who), "r"(which), "r"(expected), "r"(seen)
        : "memory");
}

/// How many times `timeout_ns` a wait may take.  Whoever is nearest to the cause of a hang should report first, so where wait A can
/// hold up wait B, A has the shorter deadline.  Missing rows of dispatch hold up a tile of GEMM 1 (1); that tile's own block (2);
/// GEMM 2 and a ring's next lap, in other blocks (3); what holds up the activations of a block holds up its weights, tile slots and
/// later tiles (4); and everything holds up the tail (5).  When pools are rings, waits chain from lap to lap, and another rank's tail
/// is as late as its slowest wait: then the first report may be that of a victim (docs/kernel.md).
MEGA_DEVICE constexpr u32 patience(Wait what) {
    switch (what) {
        case Wait::gemm1_tile_stored: return 2;
        case Wait::gemm1_done:
        case Wait::gemm2_done:
        case Wait::pool_read: return 3;
        case Wait::weight_stage_free:
        case Wait::tile_slot_free:
        case Wait::tile_published:
        case Wait::gemm2_tile_stored: return 4;
        case Wait::tail_barrier: return 5;
        default: return 1;
    }
}

/// Returns once `ready()` is true; gives up after the deadline, with `which`, `expected` and `seen()` in the record.
template <class Ready, class Seen>
MEGA_DEVICE void wait_until(const Params& p, Wait what, u32 which, u32 expected, Ready ready,
                            Seen seen) {
    if (ready()) return;
    const u64 end = ptx::nanoseconds() + p.timeout_ns * patience(what);
    bool late = false;
    do {
        if (late) give_up(p, what, which, expected, seen());
        late = ptx::nanoseconds() > end;
    } while (!ready());
}

/// Waits until the phase of this parity is complete, with a deadline: for the producer warps.
MEGA_DEVICE void wait_barrier(const Params& p, Wait what, u32 bar, u32 parity, u32 which) {
    wait_until(
        p, what, which, parity, [&] { return ptx::mbarrier_try_wait(bar, parity); },
        [&] { return parity ^ 1; });
}

/// The same without a deadline: for math and helper warps, whose tiles the publisher warp watches.
MEGA_DEVICE void wait_barrier_watched(u32 bar, u32 parity) {
    while (!ptx::mbarrier_try_wait(bar, parity)) {}
}

/// Acquires a counter in global memory when it is `expected`, which it never passes.
MEGA_DEVICE void wait_counter(const Params& p, Wait what, const u32* counter, u32 expected,
                              u32 which) {
    wait_until(
        p, what, which, expected, [&] { return ptx::load_acquire(counter) == expected; },
        [&] { return ptx::load_acquire(counter); });
}

}   // namespace megamoe
