// Stand-in for ptx/control.cuh.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

template <u32 kRegisters> void registers_grow() {}
template <u32 kRegisters> void registers_shrink() {}

inline void named_sync(u32 id, u32 threads) { sim::named_arrive(id, threads, true); }
inline void named_arrive(u32 id, u32 threads) { sim::named_arrive(id, threads, false); }

inline void pin(u32&) {}

inline u64 nanoseconds() { return sim::timer(); }
inline u32 thread_id_again() { return threadIdx.x; }
inline u32 block_id_again() { return blockIdx.x; }
inline u32 sm_id() { return blockIdx.x; }
inline u32 lane_id() { return sim::now->index; }
inline u32 warp_id() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

/// What comm/fault.cuh does with its record before it ends the launch.
[[noreturn]] void gave_up(u32 who, u32 which, u32 expected, u32 seen);

}  // namespace megamoe::ptx
