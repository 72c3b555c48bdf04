// How the weights lane (roles/load.cuh) copies a tile's codes: by bulk copies of whole k-blocks, since memory has them in the order
// of the stages.  Tile after tile of 256 rows (the last of an expert may have 128), in each the k-blocks one after the other.
#pragma once
#include "layout/shared.cuh"
#include "ptx/mbarrier.cuh"
#include "sched/order.cuh"

namespace megamoe {

/// The tile's first weight row, counted through the matrices of all experts.  Bytes from it on may need 64 bits.
template <class C> MEGA_DEVICE u32 first_weight_row(const Tile& tile) {
    return tile.expert * (tile.kind == Tile::gemm1 ? 2 * C::kIntermediate : C::kHidden) +
           tile.n * kBlockN;
}
/// Bytes of a k-block of the tile's weights, where one of 256 rows has `bytes`.
template <class C> MEGA_DEVICE u32 block_bytes(const Tile& tile, u32 bytes) {
    return bytes >> (TileOrder<C>::kHasHalf && tile.kind == Tile::gemm2 &&
                     tile.n == TileOrder<C>::kTilesN2 - 1);
}

/// For a format without exponents.
template <class C> struct CodesAlone {
    u32 bytes;
    const u8* from;

    MEGA_DEVICE CodesAlone(const Params& p, const Tile& tile) {
        const bool first = tile.kind == Tile::gemm1;
        const u32 row = first_weight_row<C>(tile);
        bytes = block_bytes<C>(tile, Shared<C>::kWeightBytes);
        from = (first ? p.weight1 : p.weight2) +
               u64(row) * (tile.k_blocks * (kBlockK * C::Weights::kBits / 8));
    }
    MEGA_DEVICE void advance() { from += bytes; }
    /// Announces and starts the copies of this k-block.
    MEGA_DEVICE void load(const Shared<C>& shared, u32 stage, u32 full) const {
        ptx::mbarrier_expect(full, bytes);
        ptx::bulk_load(shared.weights(stage), from, bytes, full);
    }
};

/// For a format with an exponent for every kGroup codes of kBits; a k-block of 256 rows has kCodes bytes of codes.  `At` says where
/// in shared memory both go.
template <class C, u32 kBits, u32 kGroup, u32 kCodes, class At> struct CodesAndExponents {
    static constexpr u32 kCodesPerExponent = kGroup * kBits / 8;   // bytes
    u32 bytes;                                                     // of codes in a k-block
    const u8 *codes, *exponents;

    MEGA_DEVICE CodesAndExponents(const Params& p, const Tile& tile)
        : bytes(block_bytes<C>(tile, kCodes)) {
        const bool first = tile.kind == Tile::gemm1;
        // runs of 128 codes before the tile
        const u64 blocks = u64(first_weight_row<C>(tile)) * tile.k_blocks;
        codes = (first ? p.weight1 : p.weight2) + blocks * (kBlockK * kBits / 8);
        exponents = (first ? p.weight1_exponents : p.weight2_exponents) +
                    blocks * (kBlockK / kGroup);
    }
    MEGA_DEVICE void advance() { codes += bytes, exponents += bytes / kCodesPerExponent; }
    /// Announces and starts the copies of this k-block.
    MEGA_DEVICE void load(const Shared<C>& shared, u32 place, u32 full) const {
        ptx::mbarrier_expect(full, bytes + bytes / kCodesPerExponent);
        ptx::bulk_load(At::codes(shared, place), codes, bytes, full);
        ptx::bulk_load(At::exponents(shared, place), exponents, bytes / kCodesPerExponent, full);
    }
};

}   // namespace megamoe
