// What CUDA gives without an include: indices, barriers of a block, warp-wide operations, a few intrinsics.
#pragma once
#include "../intrinsics.h"
#include "machine.h"

struct SimIndex {
    unsigned x;
};
#define threadIdx (SimIndex{::sim::now->warp->index * 32 + ::sim::now->index})
#define blockIdx (SimIndex{::sim::now->warp->block->index})
#define gridDim (SimIndex{::sim::now->warp->block->grid})

inline void __syncthreads() { sim::named_arrive(0, sim::now->warp->block->threads, true); }
inline void __syncwarp() {
    if (sim::mutant != sim::kNoWarpBarrier) sim::meet_warp("__syncwarp", 0);
}

namespace sim {
inline u64 bits(u32 v) { return v; }
inline u64 bits(float v) {
    u32 b;
    std::memcpy(&b, &v, 4);
    return b;
}
inline void from_bits(u64 b, u32& v) { v = static_cast<u32>(b); }
inline void from_bits(u64 b, float& v) {
    const u32 low = static_cast<u32>(b);
    std::memcpy(&v, &low, 4);
}
template <class T> T shuffle(const char* what, T value, u32 source) {
    T result;
    from_bits(meet_warp(what, bits(value))[source], result);
    return result;
}
}  // namespace sim

template <class T> T __shfl_sync(unsigned, T value, unsigned lane) { return sim::shuffle("__shfl_sync", value, lane % 32); }
template <class T> T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return sim::shuffle("__shfl_xor_sync", value, sim::now->index ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned by) {
    return sim::shuffle("__shfl_up_sync", value, sim::now->index < by ? sim::now->index : sim::now->index - by);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    const sim::u64* votes = sim::meet_warp("__ballot_sync", vote);
    unsigned mask = 0;
    for (unsigned l = 0; l < 32; ++l) mask |= static_cast<unsigned>(votes[l] & 1) << l;
    return mask;
}
inline bool __all_sync(unsigned, bool vote) {
    const sim::u64* votes = sim::meet_warp("__all_sync", vote);
    return std::all_of(votes, votes + 32, [](sim::u64 each) { return each != 0; });
}
inline unsigned __activemask() { return sim::now->warp->live; }
inline unsigned __popc(unsigned v) { return __builtin_popcount(v); }

/// On shared memory, and on the statistics, which nothing here reads.
inline unsigned atomicAdd(unsigned* p, unsigned v) {
    sim::maybe_leave();
    const unsigned old = *p;
    *p = old + v;
    return old;
}
inline int atomicAdd(int* p, int v) {
    sim::maybe_leave();
    const int old = *p;
    *p = old + v;
    return old;
}
template <class T> T __ldg(const T* p) {
    sim::memory.read(p, sizeof(T), sim::actor());
    return *p;
}

namespace sim {
/// What `T*` becomes in the kernel's argument: every access through it is checked.
template <class T> struct Reference {
    T* p;
    operator T() const {
        maybe_leave();
        memory.read(p, sizeof(T), actor());
        return *p;
    }
    T operator=(T v) const {
        maybe_leave();
        memory.write(p, sizeof(T), actor());
        return *p = v;
    }
    T operator+=(T v) const { return *this = static_cast<T>(T(*this) + v); }
};
template <class T> struct Pointer {
    T* p;
    Pointer() = default;
    Pointer(T* p_) : p(p_) {}
    operator T*() const { return p; }
    template <class I> Reference<T> operator[](I i) const { return {p + i}; }
};
template <class T> struct Pointer<const T> {
    const T* p;
    Pointer() = default;
    Pointer(const T* p_) : p(p_) {}
    operator const T*() const { return p; }
    template <class I> T operator[](I i) const { return Reference<const T>{p + i}; }
};
}  // namespace sim
