// Registers of a warpgroup, named barriers, numbers that the compiler is to keep, the timer, who a thread is.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

template <u32 kRegisters> MEGA_DEVICE void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <u32 kRegisters> MEGA_DEVICE void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// `threads` of whole warps meet at named barrier `id` (base/constants.cuh); orders their memory accesses.
MEGA_DEVICE void named_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Counts as one of them without waiting.
MEGA_DEVICE void named_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Makes the compiler forget what it knows of a number: it neither takes it apart nor computes it together with others.
MEGA_DEVICE void pin(u32& a) { asm volatile("" : "+r"(a)); }

MEGA_DEVICE u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
/// threadIdx.x, read from the special register each time (some 50 cycles) instead of kept in a register: for the math warps.
MEGA_DEVICE u32 thread_id_again() {
    u32 t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
/// blockIdx.x, likewise.
MEGA_DEVICE u32 block_id_again() {
    u32 b;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(b));
    return b;
}
/// The SM that runs this block now.
MEGA_DEVICE u32 sm_id() {
    u32 sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    return sm;
}
MEGA_DEVICE u32 lane_id() { return threadIdx.x % 32; }
/// Index of this warp in the block, known to the compiler as uniform over its lanes.  All lanes must call it.
MEGA_DEVICE u32 warp_id() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

}   // namespace megamoe::ptx
