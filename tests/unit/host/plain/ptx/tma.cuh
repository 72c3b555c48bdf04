// Stand-in for ptx/tma.cuh: what the kernel argument holds.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {
struct alignas(64) TensorMap {
    u64 opaque[16];
};
}  // namespace megamoe::ptx
