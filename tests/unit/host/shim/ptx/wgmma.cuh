// Stand-in for ptx/wgmma.cuh: products are taken when they are waited for, as late as the hardware may read its operands.
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { ++sim::now->groups; }
template <u32 kPending> void wgmma_wait() {
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
template <u32 kNumbers> class Accumulator {
    float d[kNumbers];

public:
    Accumulator() = default;
    Accumulator(const Accumulator&) = delete;   // a copy would be a read
    Accumulator& operator=(const Accumulator&) = delete;
    void clear() {
        for (float& number : d) number = 0;
    }
    void add_to(float* sums, u32 first, u32 second, float a, float b, float c, float e) const {
        sums[first] += d[first] * a, sums[first + 1] += d[first + 1] * b;
        sums[second] += d[second] * c, sums[second + 1] += d[second + 1] * e;
    }
    void scale(u32 first, float a, float b) {
        d[first] *= a, d[first + 1] *= a, d[first + 2] *= b, d[first + 3] *= b;
    }

    template <Codes kB> void multiply(u64 a, u64 b) {
        for (u64 step = 0; step < 4; ++step)
            sim::now->products.push_back({d, kNumbers, (a + 2 * step) << 4, (b + 2 * step) << 4, step > 0, sim::now->groups, false,
                                          nullptr, kB == Codes::e5m2});
    }
    /// What `load_matrix4` gave in place of numbers says where they are.
    void multiply(const u32 (&a)[4][4], u64 b) {
        for (u64 step = 0; step < 4; ++step)
            sim::now->products.push_back({d, kNumbers, 0, (b + 2 * step) << 4, step > 0, sim::now->groups, false, nullptr, true,
                                          sim::now->rows[a[step][0]]});
    }

    // With operands swapped; registers are read when the product is issued.
    void multiply_weights(u64 a, u64 b) {
        for (u64 step = 0; step < 4; ++step)
            sim::now->products.push_back({d, kNumbers, (a + 2 * step) << 4, (b + 2 * step) << 4, step > 0, sim::now->groups, true});
    }
    void multiply_weights(const u32 (&a)[4][4], u64 b) {
        for (u64 step = 0; step < 4; ++step) {
            auto tag = sim::packed_tag(a[step]);
            sim::now->products.push_back({d, kNumbers, 0, (b + 2 * step) << 4, step > 0, sim::now->groups, true, tag});
        }
    }
};

}  // namespace megamoe::ptx
