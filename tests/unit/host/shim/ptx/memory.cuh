// Stand-in for ptx/memory.cuh.
#pragma once
#include "ptx/convert.cuh"

namespace megamoe::ptx {

inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const u8*>(p) - sim::now->warp->block->shared); }

// ---- ordering
inline u32 load_acquire(const u32* p) { return sim::word_load(p, false); }
inline u32 load_acquire_system(const u32* p) { return sim::word_load(p, true); }
inline void add_release(u32* p, u32 v) { sim::word_add(p, v, sim::mutant != sim::kAddRelaxed); }
inline void add_relaxed(u32* p, u32 v) {
    sim::word_change_relaxed(p, [=](u32 old) { return old + v; });
}
inline void store_relaxed(u32* p, u32 v) {
    sim::word_change_relaxed(p, [=](u32) { return v; });
}
inline void fence_device() {
    if (sim::mutant != sim::kNoDeviceFence) sim::now->warp->fence_device();
}
inline void store_release_system(u32* p, u32 v) { sim::word_store(p, v); }
inline u32 fetch_add_release(u32* p, u32 v) { return sim::word_add(p, v, sim::mutant != sim::kBarrierAddRelaxed); }
inline u32 fetch_add_acq_rel_system(u32* p, u32 v) {
    return sim::word_add(p, v, sim::mutant != sim::kMeetingAddAcquires, sim::mutant != sim::kMeetingAddReleases);
}
inline u32 fetch_add_relaxed(u32* p, u32 v) { return sim::word_add(p, v, false); }
inline void fence_async_global() {
    if (sim::mutant != sim::kNoProxyFence) sim::now->warp->fence();
}
inline void fence_async_shared() { ++sim::now->fences; }

// ---- global memory
template <class T> T load_global(const void* p) {
    sim::maybe_leave();
    sim::memory.read(p, sizeof(T), sim::actor());
    T v;
    std::memcpy(&v, p, sizeof(T));
    return v;
}
inline u32 load_l2(const u32* p) { return load_global<u32>(p); }
inline float load_l2(const float* p) { return load_global<float>(p); }
inline Vec16 load16(const void* p) { return load_global<Vec16>(p); }
inline void load8(const void* p, u32& a, u32& b) { a = load_global<u32>(p), b = load_global<u32>(static_cast<const u8*>(p) + 4); }
inline void store16(void* p, const Vec16& v) {
    sim::maybe_leave();
    sim::memory.write(p, 16, sim::actor());
    std::memcpy(p, &v, 16);
}
inline void store8(void* p, u32 a, u32 b) {
    sim::maybe_leave();
    sim::memory.write(p, 8, sim::actor());
    std::memcpy(p, &a, 4);
    std::memcpy(static_cast<u8*>(p) + 4, &b, 4);
}
inline void copy16_async(u32 dst, const void* src) { sim::maybe_leave(), sim::start_thread_load(dst, src); }
inline void copy_async_commit() { ++sim::now->load_groups; }
template <u32 kPending> void copy_async_wait() {
    if (sim::mutant != sim::kNoWaitForThreadLoads) sim::wait_thread_loads(kPending);
}

// ---- shared memory
template <class T> T load_shared(u32 address) {
    T v;
    std::memcpy(&v, sim::now->warp->block->at(address, sizeof(T), sizeof(T)), sizeof(T));
    return v;
}
template <class T> void store_shared(u32 address, const T& v) {
    std::memcpy(sim::now->warp->block->at(address, sizeof(T), sizeof(T)), &v, sizeof(T));
}
inline Vec16 load16_shared(u32 address) { return load_shared<Vec16>(address); }
inline u32 load1_shared(u32 address) { return load_shared<u8>(address); }
inline void store16_shared(u32 address, const Vec16& v) {
    sim::now->warp->block->note_weights(address);
    store_shared(address, v);
}
inline void store4_shared(u32 address, u32 v) { store_shared(address, v); }
inline u32 load4_shared(u32 address) { return load_shared<u32>(address); }
inline float load_float_shared(u32 address) { return load_shared<float>(address); }
struct alignas(16) Vec4 {
    float f[4];
};
inline void load_floats_shared(u32 address, float& a, float& b, float& c, float& d) {
    const Vec4 v = load_shared<Vec4>(address);
    a = v.f[0], b = v.f[1], c = v.f[2], d = v.f[3];
}
struct alignas(8) Vec2 {
    u32 w[2];
};
inline void load8_shared(u32 address, u32& a, u32& b) {
    const Vec2 v = load_shared<Vec2>(address);
    a = v.w[0], b = v.w[1];
}
inline void load_floats_shared(u32 address, float& a, float& b) { a = load_float_shared(address), b = load_float_shared(address + 4); }
inline void store_floats_shared(u32 address, float a, float b, float c, float d) { store_shared(address, Vec4{{a, b, c, d}}); }
template <u32 kMatrices> void store_matrices(u32 address, const u32 (&values)[kMatrices]) {
    const u64* addresses = sim::meet_warp("stmatrix", address);
    const u32 lane = sim::now->index;
    for (u32 i = 0; i < kMatrices; ++i) store4_shared(static_cast<u32>(addresses[i * 8 + lane / 4]) + lane % 4 * 4, values[i]);
}
inline void store_matrix2(u32 address, u32 a, u32 b) {
    store_matrices(address, {a, b});
    if (sim::now->index < 16) sim::now->warp->block->note_weights(address);   // whose row it is; all lanes need a fence
}
inline void store_matrix4_bf16(u32 address, float a0, float a1, float b0, float b1, float c0, float c1, float d0, float d1) {
    store_matrices(address, {pack_bf16(a0, a1), pack_bf16(b0, b1), pack_bf16(c0, c1), pack_bf16(d0, d1)});
}
/// Keeps 32 bytes of rows l/4 and l/4 + 8 of lane l, and gives where.  Tiles of activations are not swizzled here, but the
/// addresses are.
inline void load_matrix4(u32 address, u32 (&v)[4]) {
    const u64* addresses = sim::meet_warp("ldmatrix", address);
    sim::Lane& lane = *sim::now;
    for (u32 i = 0; i < 16; ++i)
        for (u32 half = 0; half < 2; ++half)
            if ((addresses[i + 16 * half] ^ i % 8 * 16) != addresses[0] + i * 128 + half * 16)
                sim::fail("ldmatrix of other rows than those of a swizzled tile, in " + sim::name_of(&lane));
    const u32 place = lane.rows_read++ % 16;
    lane.rows[place] = std::make_shared<sim::Lane::Rows>();
    for (u32 below = 0; below < 2; ++below)
        std::memcpy(lane.rows[place]->data() + 32 * below,
                    lane.warp->block->at(static_cast<u32>(addresses[0]) + (lane.index / 4 + 8 * below) * 128, 32, 16), 32);
    v[0] = v[1] = v[2] = v[3] = place;
}
/// Lanes that do not agree do not meet.
inline void load_matrix4_if(bool wanted, u32 address, u32 (&v)[4]) {
    if (wanted) load_matrix4(address, v);
}
/// Lane l's elements are those of columns 2(l%4) and the next of row l/4; the addresses are those of columns.
template <std::size_t kMatrices> void store_matrices_transposed(u32 address, const u32 (&values)[kMatrices]) {
    const u64* addresses = sim::meet_warp("stmatrix", address);
    const u32 lane = sim::now->index;
    for (u32 i = 0; i < 2 * kMatrices; ++i)
        store_shared(static_cast<u32>(addresses[i / 2 * 8 + lane % 4 * 2 + i % 2]) + lane / 4 * 2,
                     static_cast<u16>(values[i / 2] >> i % 2 * 16));
}
inline void store_matrix4_bf16_transposed(u32 address, float a0, float a1, float b0, float b1, float c0, float c1, float d0, float d1) {
    store_matrices_transposed(address, {pack_bf16(a0, a1), pack_bf16(b0, b1), pack_bf16(c0, c1), pack_bf16(d0, d1)});
}

}  // namespace megamoe::ptx
