// Stand-in for ptx/control.cuh.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {
inline u32 current_lane;
inline u32 lane_id() { return current_lane; }
inline u32 warp_id() { return 0; }
inline void pin(u32&) {}
}  // namespace megamoe::ptx
