// Stand-in for ptx/memory.cuh.
#pragma once
#include <cstring>

#include "base/types.cuh"

namespace megamoe::ptx {
inline Vec16 load16(const void* p) {
    Vec16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void load8(const void* p, u32& a, u32& b) {
    std::memcpy(&a, p, 4);
    std::memcpy(&b, static_cast<const u8*>(p) + 4, 4);
}
inline u8 shared_memory[1 << 16];
inline void store4_shared(u32 address, u32 v) { std::memcpy(shared_memory + address, &v, 4); }
inline void store8(void* p, u32 a, u32 b) {
    std::memcpy(p, &a, 4);
    std::memcpy(static_cast<u8*>(p) + 4, &b, 4);
}
}  // namespace megamoe::ptx
