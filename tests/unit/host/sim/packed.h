// Weights of four bits that say where they come from: what a thread's registers hold once it has expanded them is decoded
// again, and is wrong unless codes and exponents are those of the same rows and columns, in their places.
//
//   codes       of row t/4 of a warp's sixteen: the tag, in eight codes of each 32 columns; of row t/4 + 8: its hash
//   exponents   one of three values, a hash of matrix, row and columns
#pragma once
#include "model.h"

namespace sim {

constexpr u32 kMagnitudes[8] = {0, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46};   // in e5m2: 0, 0.5 ... 6
constexpr u32 kLeastExponent = 15;

inline u32 tag_word(u32 tensor, u32 row, u32 column) { return (tensor == kWeight1) << 31 | row / 64 << 16 | column / 32; }
inline u32 second_word(u32 first, u32 thread) { return mix(first, thread); }
inline u32 exponent_of(u32 word, u32 row) { return kLeastExponent + mix(word, row % 64) % 3; }

/// Eight codes in the order of megamoe_jit/_layer/mxfp4.py: signs lie apart from magnitudes.
inline u32 ordered_codes(u32 nibbles) {
    u32 word = nibbles & 0x77777777;
    for (u32 i = 0; i < 8; ++i) word |= (nibbles >> (4 * i + 3) & 1) << (i < 4 ? 8 * i + 7 : 8 * (i - 4) + 3);
    return word;
}
/// The nibbles of eight e5m2 numbers, times 2 to the exponent - 16; false if there is a number that no code gives.
inline bool nibbles_of(u32 first, u32 second, u32 exponent, u32& nibbles) {
    nibbles = 0;
    for (u32 i = 0; i < 8; ++i) {
        const u32 byte = (i < 4 ? first : second) >> i % 4 * 8 & 255, size = byte & 127;
        u32 code = 0;
        while (code < 8 && size != (code == 0 ? 0 : kMagnitudes[code] + 4 * (exponent - 16))) ++code;
        if (code == 8) return false;
        nibbles |= (code | byte >> 7 << 3) << 4 * i;
    }
    return true;
}

/// Where a lane's sixteen bytes lie among its warp's: each eight lanes in a line of 128 bytes, turned by another number.
inline u32 place_of(u32 lane) { return lane / 8 * 128 + lane / 4 % 2 * 64 + (lane % 4 ^ lane / 8) * 16; }

/// One GEMM's codes and exponents, a tile of at most 256 rows after the other.
inline void fill_packed(u32 gemm, u8* codes, u8* exponents) {
    const u32 each = gemm == 1 ? 2 * sizes.intermediate : sizes.hidden, deep = gemm == 1 ? sizes.hidden : sizes.intermediate;
    for (u32 row = 0; row < each * sizes.local_experts; row += 64)
        for (u32 column = 0; column < deep; column += 32) {
            const u32 inside = row % each, tile = inside / 256 * 256, height = std::min(256u, each - tile);
            const u64 block = u64(row - inside + tile) * (deep / 128) + u64(column / 128) * height, m = (inside - tile) / 64;
            const u32 step = column / 32 % 4, word = tag_word(gemm == 1 ? kWeight1 : kWeight2, row, column);
            for (u32 thread = 0; thread < 128; ++thread) {
                const u32 words[2] = {ordered_codes(word), ordered_codes(second_word(word, thread))};
                std::memcpy(codes + block * 64 + m * 4096 + step / 2 * 2048 + thread / 32 * 512 + place_of(thread % 32) + step % 2 * 8, words, 8);
                for (u32 below = 0; below < 2; ++below)
                    exponents[block * 4 + m * 256 + thread / 4 * 8 + below * 4 + step] =
                        static_cast<u8>(exponent_of(word, thread / 32 * 16 + thread % 32 / 4 + below * 8));
            }
        }
}

/// Where the weights in this thread's four registers of a product come from; null if that is no one place.
inline std::shared_ptr<WeightTag> decoded_tag(const u32 (&a)[4]) {
    const u32 thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
    for (u32 exponent = kLeastExponent; exponent < kLeastExponent + 3; ++exponent) {
        u32 word, second;
        if (!nibbles_of(a[0], a[2], exponent, word) || exponent_of(word, row) != exponent) continue;
        if (!nibbles_of(a[1], a[3], exponent_of(word, row + 8), second) || second != second_word(word, thread)) continue;
        const u32 tensor = word >> 31 ? kWeight1 : kWeight2;
        return std::make_shared<WeightTag>(WeightTag{tensor, (word >> 16 & 0x7FFF) * 64, (word & 0xFFFF) * 32, 0});
    }
    return nullptr;
}
inline std::shared_ptr<WeightTag> packed_tag(const u32 (&a)[4]) {
    auto tag = decoded_tag(a);
    if (!tag) fail("weights in registers that are not those of any one place, in " + name_of(now));
    return tag;
}

/// A tile may end after 128 rows: what lies behind is nobody's, and its products, which are no good then, are stored nowhere.
inline std::shared_ptr<WeightTag> unpacked_tag(u32 address) {
    const u32 thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4, inside = address % 128;
    const Block& block = *now->warp->block;
    u32 a[4];
    for (u32 i = 0; i < 4; ++i) {
        const u32 at = address - inside + (row + i % 2 * 8) * 128 + ((inside + i / 2 * 16) ^ row % 8 * 16) + thread % 4 * 4;
        block.need_fence(at, 4);
        std::memcpy(a + i, block.shared + at, 4);
    }
    auto tag = decoded_tag(a);
    return tag ? tag : std::make_shared<WeightTag>(WeightTag{kWeight2, ~0u, ~0u, 0});
}

}  // namespace sim
