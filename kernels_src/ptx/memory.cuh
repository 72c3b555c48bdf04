// Loads, stores, atomics and fences with their scope spelled out.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#memory-consistency-model
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

MEGA_DEVICE u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- ordering
MEGA_DEVICE u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MEGA_DEVICE u32 load_acquire_system(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MEGA_DEVICE void add_release(u32* p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MEGA_DEVICE void add_relaxed(u32* p, u32 v) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MEGA_DEVICE void store_relaxed(u32* p, u32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
/// Orders all before it with relaxed stores and additions after it.
MEGA_DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
MEGA_DEVICE void store_release_system(u32* p, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MEGA_DEVICE u32 fetch_add_release(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}
MEGA_DEVICE u32 fetch_add_acq_rel_system(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.acq_rel.sys.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}
MEGA_DEVICE u32 fetch_add_relaxed(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(p), "r"(v)
                 : "memory");
    return old;
}

/// Orders this thread's ordinary accesses to global memory with copies of the async proxy (TMA), both ways.
MEGA_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
MEGA_DEVICE void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- data
/// Through L2, never L1: for what other blocks or ranks wrote in this launch.
MEGA_DEVICE u32 load_l2(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MEGA_DEVICE float load_l2(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
/// Input rows, maybe of another rank: nothing reads them before the ranks have met, so no L1 can hold an older state.
MEGA_DEVICE Vec16 load16(const void* p) {
    Vec16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p)
                 : "memory");
    return v;
}
/// Eight bytes that nobody writes.
MEGA_DEVICE void load8(const void* p, u32& a, u32& b) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(a), "=r"(b)
                 : "l"(p)
                 : "memory");
}
MEGA_DEVICE void store16(void* p, const Vec16& v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]),
                 "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}
MEGA_DEVICE void store8(void* p, u32 a, u32 b) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(a), "r"(b) : "memory");
}
MEGA_DEVICE Vec16 load16_shared(u32 address) {
    Vec16 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(address)
                 : "memory");
    return v;
}
/// Four matrices of eight rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8, and gets of each the four
/// bytes 4(l % 4) of row l / 4.
MEGA_DEVICE void load_matrix4(u32 address, u32 (&v)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
}
/// The way back: lane l gives of each matrix the four bytes 4(l % 4) of row l / 4, and the address of row l % 8 of matrix l / 8.
MEGA_DEVICE void store_matrix4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
/// Sixteen bytes from global to shared memory without a register; complete when the thread has waited for their group.
MEGA_DEVICE void copy16_async(u32 dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
MEGA_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// All but the last kPending of this thread's groups are complete.
template <u32 kPending> MEGA_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
MEGA_DEVICE void store4_shared(u32 address, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
MEGA_DEVICE u32 load4_shared(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
MEGA_DEVICE float load_float_shared(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}
MEGA_DEVICE void load_floats_shared(u32 address, float& a, float& b) {
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(a), "=f"(b) : "r"(address) : "memory");
}
MEGA_DEVICE void load8_shared(u32 address, u32& a, u32& b) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}
MEGA_DEVICE void load_floats_shared(u32 address, float& a, float& b, float& c, float& d) {
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
                 : "r"(address)
                 : "memory");
}
MEGA_DEVICE void store_floats_shared(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(a), "f"(b), "f"(c),
                 "f"(d)
                 : "memory");
}
/// Four 8x8 matrices of bf16; lane l gives the address of row l % 8 of matrix l / 8, and two numbers of each.
MEGA_DEVICE void store_matrix4_bf16(u32 address, float a0, float a1, float b0, float b1, float c0,
                                    float c1, float d0, float d1) {
    asm volatile(
        "{\n.reg .b32 a, b, c, d;\n"
        "cvt.rn.bf16x2.f32 a, %2, %1;\ncvt.rn.bf16x2.f32 b, %4, %3;\ncvt.rn.bf16x2.f32 c, %6, %5;\ncvt.rn.bf16x2.f32 d, %8, %7;\n"
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {a, b, c, d};\n}" ::"r"(address),
        "f"(a0), "f"(a1), "f"(b0), "f"(b1), "f"(c0), "f"(c1), "f"(d0), "f"(d1)
        : "memory");
}
/// The same of matrices whose columns are to be rows in memory: the lane's address is that of a column.
MEGA_DEVICE void store_matrix4_bf16_turned(u32 address, float a0, float a1, float b0, float b1,
                                           float c0, float c1, float d0, float d1) {
    asm volatile(
        "{\n.reg .b32 a, b, c, d;\n"
        "cvt.rn.bf16x2.f32 a, %2, %1;\ncvt.rn.bf16x2.f32 b, %4, %3;\ncvt.rn.bf16x2.f32 c, %6, %5;\ncvt.rn.bf16x2.f32 d, %8, %7;\n"
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {a, b, c, d};\n}" ::"r"(address),
        "f"(a0), "f"(a1), "f"(b0), "f"(b1), "f"(c0), "f"(c1), "f"(d0), "f"(d1)
        : "memory");
}

}   // namespace megamoe::ptx
