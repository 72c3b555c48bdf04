// Stand-in for ptx/tma.cuh.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

/// Which tensor it is; sim/model.h knows them.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

inline void tma_load_2d(u32 dst, const TensorMap* map, u32 bar, u32 c0, u32 c1) {
    sim::maybe_leave();
    sim::load_box(dst, map->opaque, bar, c0, c1);
}
inline void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
    sim::maybe_leave();
    if (bytes % 16 != 0 || reinterpret_cast<u64>(src) % 16 != 0) sim::fail("a bulk load of odd size or address");
    sim::memory.read(src, bytes, sim::copy_actor());
    sim::u8* to = sim::now->warp->block->at(dst, bytes, 16);
    sim::Warp* warp = sim::now->warp;
    const u32 remote = sim::memory.find(src, bytes, "read").rank != warp->block->rank;
    warp->remote_copies += remote;
    sim::traffic.copies_in_flight = std::max<u64>(sim::traffic.copies_in_flight, warp->remote_copies);
    sim::start_load(bar, bytes, [=] { std::memcpy(to, src, bytes), warp->remote_copies -= remote; });
}
inline void bulk_store(void* dst, u32 src, u32 bytes) {
    sim::maybe_leave();
    if (bytes % 16 != 0 || reinterpret_cast<u64>(dst) % 16 != 0) sim::fail("a bulk store of odd size or address");
    sim::memory.write(dst, bytes, sim::copy_actor());
    sim::start_store(static_cast<sim::u8*>(dst), src, bytes);
}
template <u32 kPending> void bulk_wait_read() {
    if (sim::mutant != sim::kNoWaitForStoresRead) sim::wait_stores(kPending, 1);
}
template <u32 kPending> void bulk_wait() {
    if (sim::mutant != sim::kNoWaitForStores) sim::wait_stores(kPending, 2);
}
inline void bulk_wait_all() { bulk_wait<0>(); }
inline void prefetch_tensor_map(const TensorMap*) {}

}  // namespace megamoe::ptx
