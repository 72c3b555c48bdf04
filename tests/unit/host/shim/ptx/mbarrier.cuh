// Stand-in for ptx/mbarrier.cuh.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

inline void mbarrier_init(u32 bar, u32 arrivals) { sim::phase_init(bar, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u32 bar) { sim::phase_arrive(bar); }
inline void mbarrier_expect(u32 bar, u32 bytes) { sim::phase_expect(bar, bytes); }
inline bool mbarrier_test(u32 bar, u32 parity) { return sim::phase_look(bar, parity); }
inline bool mbarrier_try_wait(u32 bar, u32 parity) { return sim::phase_wait(bar, parity); }

}  // namespace megamoe::ptx
