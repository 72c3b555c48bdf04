// Integer types and function attributes; every other file includes this one.  No CUDA header is included anywhere in
// kernels_src/: NVRTC ships none, and a header that is not included cannot be found in the wrong version.  Under a plain C++17
// compiler, with which the host tests build the index arithmetic, the attributes expand to `inline`.
#pragma once

#if defined(__CUDACC__)
#define MEGA_DEVICE __device__ __forceinline__
// offsetof, for which NVRTC has no header
#define MEGA_OFFSET(type, member) __INTADDR__(&static_cast<type*>(nullptr)->member)
#else
#define MEGA_DEVICE inline
#define MEGA_OFFSET(type, member) __builtin_offsetof(type, member)
#endif

namespace megamoe {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "unexpected integer sizes");

/// ceil(a / b); a + b - 1 must not exceed 2^32 - 1.
MEGA_DEVICE constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
MEGA_DEVICE constexpr u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }

/// Sixteen bytes, loaded and stored by one instruction.
struct alignas(16) Vec16 {
    u32 w[4];
};

}   // namespace megamoe
