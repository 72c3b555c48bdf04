// Bulk copies of the tensor memory accelerator (async proxy).  Global to shared: complete on an mbarrier, which was told their
// bytes (mbarrier_expect).  Shared to global: complete in groups of the thread that issued them, so the same thread must wait.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

/// A CUtensorMap, filled by `megamoe_jit/_device/tensor_map.py`.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// clang-format off
/// The box at column `c0`, row `c1` of a 2-D tensor.  Rows beyond the tensor arrive as zeros, and count as bytes.
MEGA_DEVICE void tma_load_2d(u32 dst, const TensorMap* map, u32 bar, u32 c0, u32 c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map), "r"(bar), "r"(c0), "r"(c1)
        : "memory");
}
/// `bytes` (a multiple of 16) from a 16-byte aligned address.
MEGA_DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar)
        : "memory");
}
/// To a 16-byte aligned address; each store is a group of its own.
MEGA_DEVICE void bulk_store(void* dst, u32 src, u32 bytes) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;" ::"l"(dst), "r"(src), "r"(bytes)
        : "memory");
}
// clang-format on
/// Waits until all but the last kPending groups have read their shared memory, which may then be written again.
template <u32 kPending> MEGA_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Waits until all but the last kPending groups are complete: their writes are visible to this thread.
template <u32 kPending> MEGA_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
MEGA_DEVICE void bulk_wait_all() { bulk_wait<0>(); }

MEGA_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}   // namespace megamoe::ptx
