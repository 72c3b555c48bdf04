// Stand-in for ptx/wgmma.cuh: products are taken when they are waited for, as late as the hardware may read its operands.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { ++sim::now->groups; }
template <u32 kPending, std::size_t kNumbers> void wgmma_wait(float (&)[kNumbers]) {
    if (sim::mutant == sim::kNoWaitForProducts && kPending > 0) return;
    auto& products = sim::now->products;
    std::size_t due = 0;
    for (; due < products.size() && products[due].group + kPending < sim::now->groups; ++due) sim::multiply(products[due]);
    products.erase(products.begin(), products.begin() + due);
}
inline void pin(u64&, u64&) {}
inline void write_zeros(float* d) { d[0] = d[1] = d[2] = d[3] = 0; }

/// Shared addresses of the first rows instead of descriptors, in units of 16 bytes as theirs.
inline u64 matrix_descriptor(u32 address) {
    if (address % 1024 != 0) sim::fail("a matrix that does not begin at an atom of the swizzle");
    return address >> 4;
}
constexpr u32 kDescriptorRows64 = 512;

enum class Codes : u32 { e4m3, e5m2 };
template <Codes kB> void wgmma_m64n64k128(float (&d)[32], u64 a, u64 b) {
    for (u64 step = 0; step < 4; ++step)
        sim::now->products.push_back({d, 32, (a + 2 * step) << 4, (b + 2 * step) << 4, step > 0, sim::now->groups, false, nullptr,
                                      kB == Codes::e5m2});
}
/// What `load_matrix4` gave in place of numbers says where they are.
inline void wgmma_m64n64k128(float (&d)[32], const u32 (&a)[4][4], u64 b) {
    for (u64 step = 0; step < 4; ++step)
        sim::now->products.push_back({d, 32, 0, (b + 2 * step) << 4, step > 0, sim::now->groups, false, nullptr, true,
                                      sim::now->rows[a[step][0]]});
}

// With operands swapped; registers are read when the product is issued.
template <u32 kN> void wgmma_weights_shared(float (&d)[kN / 2], u64 a, u64 b) {
    for (u64 step = 0; step < 4; ++step)
        sim::now->products.push_back({d, kN / 2, (a + 2 * step) << 4, (b + 2 * step) << 4, step > 0, sim::now->groups, true});
}
template <size_t n> void wgmma_weights_again(float (&d)[n], const u32 (&a)[4][4], u64 b) {
    for (u64 step = 0; step < 4; ++step) {
        auto tag = sim::packed_tag(a[step]);
        sim::now->products.push_back({d, n, 0, (b + 2 * step) << 4, step > 0, sim::now->groups, true, tag});
    }
}
template <u32 kN> void wgmma_weights_registers(float (&d)[kN / 2], const u32 (&a)[4][4], u64 b) {
    wgmma_weights_again(d, a, b);
}

}  // namespace megamoe::ptx
