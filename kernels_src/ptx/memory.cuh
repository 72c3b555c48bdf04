// Loads, stores, atomics and fences, each with its scope in its name: gpu unless it says `system`.
// What orders what with them is in docs/protocol.md.
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
/// Makes relaxed stores and additions that follow it releases of everything before it.
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

/// Proxy fence: orders ordinary accesses (generic proxy) that happen before it in this thread, its own or acquired ones, with
/// TMA and bulk copies (async proxy) that happen after it; and copies that were waited for with ordinary accesses after it.
MEGA_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
/// The same for shared memory; WGMMA reads it through the async proxy too.
MEGA_DEVICE void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- data
/// From L2, never L1: for what other blocks or ranks wrote in this launch.
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
/// Not kept in L1, but may hit there: only for what no block has read earlier in the launch than the barrier that orders it after
/// its last write, such as input rows, maybe of another rank, and for what nobody writes.
MEGA_DEVICE Vec16 load16(const void* p) {
    Vec16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p)
                 : "memory");
    return v;
}
/// Likewise, eight bytes.
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
/// Loads four matrices of eight rows of 16 bytes: lane l passes the address of row l % 8 of matrix l / 8, and gets from each matrix
/// the four bytes from 4 (l % 4) on of row l / 4.
MEGA_DEVICE void load_matrix4(u32 address, u32 (&v)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
}
/// The same if `wanted`, upon which all lanes must agree; else `v` stays.  No branch, so that ptxas may mix it with other work.
MEGA_DEVICE void load_matrix4_if(bool wanted, u32 address, u32 (&v)[4]) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
        "@p ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n}"
        : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
        : "r"(address), "r"(u32(wanted))
        : "memory");
}
/// Stores two such matrices: lane l passes for each the four bytes from 4 (l % 4) on of row l / 4, and lanes 0 to 15 the address of
/// row l % 8 of matrix l / 8.
MEGA_DEVICE void store_matrix2(u32 address, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(a),
                 "r"(b)
                 : "memory");
}
/// One, two or four of them, transposed: the address that a lane passes is that of a column, which becomes a row in memory.  Those of
/// lanes 0 to 7, 0 to 15, or all count; the others may be any.
MEGA_DEVICE void store_matrices_transposed(u32 address, const u32 (&v)[1]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address),
                 "r"(v[0])
                 : "memory");
}
MEGA_DEVICE void store_matrices_transposed(u32 address, const u32 (&v)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address),
                 "r"(v[0]), "r"(v[1])
                 : "memory");
}
MEGA_DEVICE void store_matrices_transposed(u32 address, const u32 (&v)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
        : "memory");
}
MEGA_DEVICE void store16_shared(u32 address, const Vec16& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.w[0]), "r"(v.w[1]),
                 "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}
/// cp.async: sixteen bytes from global to shared memory without a register, by the generic proxy; complete when the thread has
/// waited for their group.
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
/// One byte.
MEGA_DEVICE u32 load1_shared(u32 address) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
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
/// Converts to bf16 and stores four 8x8 matrices: lane l passes the address of row l % 8 of matrix l / 8, and of each matrix the
/// numbers 2 (l % 4) and the next of row l / 4.
MEGA_DEVICE void store_matrix4_bf16(u32 address, float a0, float a1, float b0, float b1, float c0,
                                    float c1, float d0, float d1) {
    asm volatile(
        "{\n.reg .b32 a, b, c, d;\n"
        "cvt.rn.bf16x2.f32 a, %2, %1;\ncvt.rn.bf16x2.f32 b, %4, %3;\ncvt.rn.bf16x2.f32 c, %6, %5;\ncvt.rn.bf16x2.f32 d, %8, %7;\n"
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {a, b, c, d};\n}" ::"r"(address),
        "f"(a0), "f"(a1), "f"(b0), "f"(b1), "f"(c0), "f"(c1), "f"(d0), "f"(d1)
        : "memory");
}
/// The same, transposed: the address that a lane passes is that of a column, which becomes a row in memory.
MEGA_DEVICE void store_matrix4_bf16_transposed(u32 address, float a0, float a1, float b0, float b1,
                                               float c0, float c1, float d0, float d1) {
    asm volatile(
        "{\n.reg .b32 a, b, c, d;\n"
        "cvt.rn.bf16x2.f32 a, %2, %1;\ncvt.rn.bf16x2.f32 b, %4, %3;\ncvt.rn.bf16x2.f32 c, %6, %5;\ncvt.rn.bf16x2.f32 d, %8, %7;\n"
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {a, b, c, d};\n}" ::"r"(address),
        "f"(a0), "f"(a1), "f"(b0), "f"(b1), "f"(c0), "f"(c1), "f"(d0), "f"(d1)
        : "memory");
}

}   // namespace megamoe::ptx
