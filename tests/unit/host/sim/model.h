// Numbers instead of the layer's arithmetic: what the tensor cores would multiply is hashed, so that every output of the
// launch depends on which rows, weights and scales of which launch were really in shared memory when they were read.
//
//   x          16 bytes hold {hash of launch, rank, token, place; scale of the 128-block; launch; the hash again}; in each
//              128-block one byte is 255.  Raw rows hold the same as bf16 times the scale, which quantising makes of it again
//   GEMM 1     in 32 steps of depth each, levels 0 to 255 times a factor of expert and tile: the largest, 255, in every
//              32nd column, two hashed sums in the others.  SwiGLU keeps them, quantisation makes codes of the levels
//   GEMM 2     hashes those codes into integers; their sum goes to the combine slot, as bf16 that holds integers
//   combine    weights 1 to 3, so the sum is an integer too
//
// All scales are powers of two or cancel exactly enough to be rounded away.
#pragma once
#include "builtins.h"

#pragma GCC push_options
#pragma GCC optimize("O2")   // half of a run's time is spent here

namespace sim {

enum Tensor : u32 { kAct1, kWeight1, kAct2, kWeight2 };

/// Sizes of the layer, from the kernel's own configuration.
struct Sizes {
    u32 hidden, intermediate, local_experts, topk;
};
inline Sizes sizes;
constexpr u32 kMostValue = 1000;   // of a combine slot

inline u32 mix(u32 h, u32 v) {
    h = (h ^ v) * 0x9E3779B1u;
    return h ^ h >> 15;
}
inline u32 mix(u32 a, u32 b, u32 c, u32 d) { return mix(mix(mix(mix(0x1234567, a), b), c), d); }
inline u32 fold(const void* thirty_two_bytes) {
    u32 words[8], h = 7;
    std::memcpy(words, thirty_two_bytes, 32);
    for (u32 w : words) h = mix(h, w);
    return h;
}

inline float x_scale(u32 launch, u32 rank, u32 token, u32 block) { return 1u << mix(launch, rank, token, block) % 3; }
inline void fill_x(u32 launch, u32 rank, u32 token, u8* row) {
    for (u32 c = 0; c < sizes.hidden / 16; ++c) {
        const u32 tag = mix(launch * 64 + rank, token, c, 5);
        const u32 largest = c % 8 == 0 ? 0xFF000000 : 0;
        const u32 words[4] = {tag, static_cast<u32>(x_scale(launch, rank, token, c / 8)), launch | largest, tag};
        std::memcpy(row + 16 * c, words, 16);
    }
}
/// The row as the caller has it, in bf16.
inline void fill_raw_x(u32 launch, u32 rank, u32 token, u8* to) {
    std::vector<u8> row(sizes.hidden);
    fill_x(launch, rank, token, row.data());
    for (u32 c = 0; c < sizes.hidden; ++c) {
        const float value = row[c] * x_scale(launch, rank, token, c / 128);
        std::memcpy(to + 2 * c, reinterpret_cast<const u8*>(&value) + 2, 2);   // exact: a code has eight bits
    }
}
/// The scale that a kernel has found of a block whose largest number is 255 times it, as this model has it.
inline float staged_scale(float scale) { return static_cast<float>(static_cast<u32>(scale * (448.0f / 255.0f) + 0.5f)); }
inline float weight_scale(u32 gemm, u32 expert, u32 row, u32 block) { return 1u << mix(gemm, expert, row, block) % 3; }
/// Of a tile of GEMM 1.
inline float factor(u32 expert, u32 n) { return 1 + mix(expert, n, 0, 9) % 5; }
inline u32 level(u32 key, u32 expert, u32 n, u32 step, u32 salt) {
    return mix(key, expert * 1024 + n, step, salt) % (254 / (sizes.hidden / 32) + 1);
}
inline u32 slot_value(u32 key, u32 expert, u32 group, u32 step) {
    return mix(key, expert * 1024 + group, step, 3) % (kMostValue / (sizes.intermediate / 32) + 1);
}
inline float act2_scale(u32 expert, u32 n) { return 255 * factor(expert, n) / 448; }

/// Writes the tags of one GEMM's weights, which lie as megamoe_jit/_layer/fp8.py orders them: at the first byte of every 64th
/// row.  Nothing else in there is read.
inline void fill_weights(u32 gemm, u8* base) {
    const u32 each = gemm == 1 ? 2 * sizes.intermediate : sizes.hidden, deep = gemm == 1 ? sizes.hidden : sizes.intermediate;
    for (u32 row = 0; row < each * sizes.local_experts; row += 64)
        for (u32 column = 0; column < deep; column += 32) {
            const u32 inside = row % each, tile = inside / 256 * 256, height = std::min(256u, each - tile);
            const u64 at = u64(row - inside + tile) * deep + u64(column / 128) * height * 128 + (inside - tile) * 128 + column % 128;
            const WeightTag tag{gemm == 1 ? kWeight1 : kWeight2, row, column, 0};
            std::memcpy(base + at, &tag, sizeof tag);
        }
}

/// Copies a box of activations.
inline void load_box(u32 dst, const u64* map, u32 bar, u32 column, u32 row) {
    const u32 width = static_cast<u32>(map[3]), rows = static_cast<u32>(map[4]);
    u8* to = now->warp->block->at(dst, rows * 128, 1024);
    if (column + 128 > width) fail("a box outside of its tensor, in " + name_of(now));
    if (row + rows > map[2]) fail("a box below its tensor, in " + name_of(now));
    const u8* from = reinterpret_cast<const u8*>(map[1]) + u64(row) * width + column;
    for (u32 r = 0; r < rows; ++r) memory.read(from + u64(r) * width, 128, copy_actor());
    start_load(bar, rows * 128, [=] {
        for (u32 r = 0; r < rows; ++r) std::memcpy(to + r * 128, from + u64(r) * width, 128);
    });
}

/// A product's number of a row of 64 weights and of 32 activations, of which `key` is the hash.
inline float term(const WeightTag& tag, u32 row, const u8* a, u32 key) {
    const u32 first = now->warp->block->rank * sizes.local_experts, step = tag.column / 32;
    if (tag.tensor == kWeight1) {
        const u32 inside = tag.row % (2 * sizes.intermediate), n = inside / 256;
        const u32 expert = first + tag.row / (2 * sizes.intermediate);
        u32 scale;
        std::memcpy(&scale, a + 4, 4);
        const bool gate = row / 8 % 2 == 0;
        const u32 scale_row = gate ? n : sizes.intermediate / 128 + n, steps = sizes.hidden / 32;
        const float by = scale * weight_scale(1, expert, scale_row, step / 4);
        const u32 output = inside % 256 / 2 + row / 16 * 8 + row % 8;
        const float value = output % 32 == 0 ? 255.0f / steps : level(key, expert, n, step, output % 2);
        return (gate ? value * factor(expert, n) : 1.0f / steps) / by;
    }
    const u32 expert = first + tag.row / sizes.hidden, inside = tag.row % sizes.hidden;
    const float by = act2_scale(expert, step / 4) * weight_scale(2, expert, inside / 128, step / 4);
    return slot_value(key, expert, inside / 64, step) / by;
}
/// Rows with the same number in every product with these weights; below 6.
inline u32 kind_of(const WeightTag& tag, u32 row) {
    if (tag.tensor != kWeight1) return 0;
    const u32 output = row / 16 * 8 + row % 8;   // the tag's row is a multiple of 64
    return row / 8 % 2 + 2 * (output % 32 == 0 ? 0 : 1 + output % 2);
}
/// Where e5m2 weights come from that were packed: decoded from this thread's part of 64 rows of a swizzled tile (sim/packed.h).
std::shared_ptr<WeightTag> unpacked_tag(u32 address);

/// This thread's part of a product of 64 rows and 8 columns for every four registers, 32 deep.  Rows are activations, or
/// weights where operands are swapped.
inline void multiply(const Lane::Product& product) {
    const Block& block = *now->warp->block;
    const u32 lane = now->index;
    WeightTag tag;
    if (product.tag) tag = *product.tag;
    else if (product.unpacked) tag = *unpacked_tag(product.b);
    else std::memcpy(&tag, block.shared + (product.swapped ? product.a : product.b), sizeof tag);
    const u8* known[2] = {};   // activations, and their hashes: those of a row or of two columns come again
    u32 keys[2] = {}, there[2] = {};
    float terms[2][6];   // with each of them by kind of row, those that are there
    for (u32 i = 0; i < product.count; ++i) {
        const u32 row = now->warp->index % 4 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        const u8* a = product.rows ? product.rows->data() + i / 2 % 2 * 32
                                   : block.shared + (product.swapped ? product.b + column * 128 : product.a + row * 128);
        const u32 slot = product.swapped ? i % 2 : i / 2 % 2;
        if (a != known[slot]) known[slot] = a, keys[slot] = fold(a), there[slot] = 0;
        const u32 weight = product.swapped ? row : column, kind = kind_of(tag, weight);
        if (!(there[slot] >> kind & 1)) terms[slot][kind] = term(tag, weight, a, keys[slot]), there[slot] |= 1 << kind;
        product.to[i] = (product.accumulate ? product.to[i] : 0) + terms[slot][kind];
    }
}

/// What combine shall find for a row and its expert, by groups of 64 columns.
inline std::vector<u32> expected_slot(const u8* x, u32 expert) {
    std::vector<u32> sums(sizes.hidden / 64);
    for (u32 n = 0; n < sizes.intermediate / 128; ++n) {
        u32 levels[2] = {};
        for (u32 step = 0; step < sizes.hidden / 32; ++step)
            for (u32 odd = 0; odd < 2; ++odd) levels[odd] += level(fold(x + 32 * step), expert, n, step, odd);
        u8 codes[32];
        for (u32 c = 0; c < 32; ++c) codes[c] = c == 0 ? 255 : levels[c % 2];
        for (u32 group = 0; group < sums.size(); ++group)
            for (u32 step = 4 * n; step < 4 * n + 4; ++step) sums[group] += slot_value(fold(codes), expert, group, step);
    }
    return sums;
}

}  // namespace sim

#pragma GCC pop_options
