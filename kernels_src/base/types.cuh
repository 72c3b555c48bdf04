// Integer names and function attributes.  No CUDA header is needed anywhere below this folder: NVRTC ships none, and
// what is not included cannot be found in the wrong version.  With a plain C++17 compiler (host tests of the
// index arithmetic) the attributes vanish.
#pragma once

#if defined(__CUDACC__)
#define MEGA_DEVICE __device__ __forceinline__
// offsetof, of which it has no header
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

/// ceil(a / b) for unsigned integers.
MEGA_DEVICE constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
MEGA_DEVICE constexpr u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }

/// Sixteen bytes, moved as one.
struct alignas(16) Vec16 {
    u32 w[4];
};

}   // namespace megamoe
