// Stand-in for ptx/memory.cuh.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <vector>

#include "base/types.cuh"
#include "ptx/control.cuh"

namespace megamoe::ptx {
inline Vec16 load16(const void* p) {
    Vec16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void load8(const void* p, u32& a, u32& b) {
    std::memcpy(&a, p, 4);
    std::memcpy(&b, static_cast<const u8*>(p) + 4, 4);
}
inline u8 shared_memory[1 << 16];

struct Access {
    u32 address, bytes;
};
inline std::array<std::vector<Access>, 32> accesses;   // of each lane to shared memory, by ordinary loads and stores
inline void note(u32 address, u32 bytes) { accesses[current_lane].push_back({address, bytes}); }
/// How many words of one bank lanes want at once, at most: in runs of lanes that have 128 bytes together.
inline u32 worst_bank() {
    u32 worst = 0;
    for (u32 i = 0; i < accesses[0].size(); ++i)
        for (u32 first = 0, lanes = std::min(32u, 128 / accesses[0][i].bytes); first < 32; first += lanes) {
            std::array<std::set<u32>, 32> words;
            for (u32 lane = first; lane < first + lanes; ++lane)
                for (u32 b = 0; b < accesses[lane][i].bytes; ++b) {
                    const u32 word = (accesses[lane][i].address + b) / 4;
                    words[word % 32].insert(word);
                }
            for (const auto& bank : words) worst = std::max(worst, static_cast<u32>(bank.size()));
        }
    return worst;
}

inline void store4_shared(u32 address, u32 v) { std::memcpy(shared_memory + address, &v, 4); }
inline Vec16 load16_shared(u32 address) { return note(address, 16), load16(shared_memory + address); }
inline void store16_shared(u32 address, const Vec16& v) { note(address, 16), std::memcpy(shared_memory + address, &v, sizeof v); }
inline u32 load1_shared(u32 address) { return note(address, 1), shared_memory[address]; }
inline void load8_shared(u32 address, u32& a, u32& b) { note(address, 8), load8(shared_memory + address, a, b); }

struct MatrixStore {
    u32 address;
    std::vector<u32> values;   // one for each matrix
};
inline std::array<std::vector<MatrixStore>, 32> matrix_stores;   // of each lane
/// Lanes run one after the other here, and each needs the addresses of all: `store_matrices` does what they have asked for.
inline void store_matrix2(u32 address, u32 a, u32 b) {
    matrix_stores[current_lane].push_back({address, {a, b}});
}
inline void store_matrices() {
    for (u32 i = 0; i < matrix_stores[0].size(); ++i)
        for (u32 lane = 0; lane < 32; ++lane)
            for (u32 m = 0; m < matrix_stores[0][i].values.size(); ++m)
                store4_shared(matrix_stores[m * 8 + lane / 4][i].address + lane % 4 * 4, matrix_stores[lane][i].values[m]);
    for (auto& of_lane : matrix_stores) of_lane.clear();
}
inline void store8(void* p, u32 a, u32 b) {
    std::memcpy(p, &a, 4);
    std::memcpy(static_cast<u8*>(p) + 4, &b, 4);
}
}  // namespace megamoe::ptx
