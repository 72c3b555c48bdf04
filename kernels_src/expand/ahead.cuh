// Weights of four bits are expanded in memory before the matrix work reads them: each once, whatever the number of rows.
//
// Packed and expanded weights lie in the same order, tile by tile and k-block by k-block, so 64 rows of a k-block are a piece:
// 4096 bytes of codes and 256 of exponents become 8192 of e5m2, at the same place in their matrix.  A warp takes a piece through
// registers into shared memory and has the bulk copy engine write it.
//
//   expanded[expert][column]   released here, once per piece     acquired by the weights lane of any block (roles/load.cuh)
//
// Nobody waits here for anything but memory.  Only experts that have rows are expanded.
#pragma once
#include "comm/fault.cuh"
#include "expand/unpack.cuh"
#include "layout/shared.cuh"
#include "ptx/tma.cuh"
#include "sched/order.cuh"

namespace megamoe {

template <class C> struct Expansion {
    static constexpr u32 kColumnPieces1 = kBlockN / PackedPiece::kRows * (C::kHidden / kBlockK),
                         kColumnPieces2 = kBlockN / PackedPiece::kRows * (C::kIntermediate / kBlockK);
    static constexpr u32 kPieces1 = 2 * C::kIntermediate / PackedPiece::kRows * (C::kHidden / kBlockK),
                         kPieces2 = C::kHidden / PackedPiece::kRows * (C::kIntermediate / kBlockK),
                         kPieces = kPieces1 + kPieces2;   // of an expert
    static constexpr u32 kColumns = TileOrder<C>::kTilesN1 + TileOrder<C>::kTilesN2;
    // pieces that a warp has in shared memory at the head, where the stages will be
    static constexpr u32 kSlots = min_u32(2, Shared<C>::kStagingAt / (kWarps * PackedPiece::kBytes));
    static_assert(kSlots > 0, "no room to expand weights in");

    const Params& p;
    const Shared<C>& shared;
    const ExpertTable& table;

    /// Pieces of all experts that have rows, in the order in which tiles need them.
    MEGA_DEVICE u32 pieces() const { return table.active_experts * kPieces; }

    struct Piece {
        const u8 *codes, *exponents;
        u8* to;
        u32* expanded;
    };
    MEGA_DEVICE Piece at(u32 i) const {
        const u32 expert = table.active[i / kPieces], own = i % kPieces;
        const bool first = own < kPieces1;
        const u32 inside = first ? own : own - kPieces1;
        const u32 column = first ? inside / kColumnPieces1
                                 : TileOrder<C>::kTilesN1 + inside / kColumnPieces2;
        const u64 place = u64(expert) * (first ? kPieces1 : kPieces2) + inside;
        return {(first ? p.packed1 : p.packed2) + place * PackedPiece::kCodeBytes,
                (first ? p.weight1_exponents : p.weight2_exponents) +
                    place * PackedPiece::kExponentBytes,
                (first ? p.expanded1 : p.expanded2) + place * PackedPiece::kBytes,
                p.expanded + expert * kColumns + column};
    }

    /// All pieces, by all warps, in the stages, which nobody else uses yet.
    MEGA_DEVICE void all() const {
        const u32 warp = ptx::warp_id(), workers = kWarps * gridDim.x, end = pieces();
        const u32 room = shared.address + warp * (kSlots * PackedPiece::kBytes);
        PackedPiece next;
        u32 *expanded[kSlots] = {}, begin = warp * gridDim.x + blockIdx.x;
        if (begin < end) load(next, begin);
#pragma unroll 1
        for (u32 i = begin, slot = 0; i < end; i += workers, slot = (slot + 1) % kSlots) {
            const PackedPiece piece = next;
            if (i + workers < end) load(next, i + workers);
            if (ptx::lane_id() == 0) ptx::bulk_wait<kSlots - 1>();
            if (ptx::lane_id() == 0 && expanded[0]) ptx::add_release(expanded[0], 1);
            if constexpr (kSlots > 1) expanded[0] = expanded[1];
            __syncwarp();
            piece.unpack(room + slot * PackedPiece::kBytes);
            ptx::fence_async_shared();
            __syncwarp();
            const Piece where = at(i);
            if (ptx::lane_id() == 0)
                ptx::bulk_store(where.to, room + slot * PackedPiece::kBytes, PackedPiece::kBytes);
            expanded[kSlots - 1] = where.expanded;
        }
        if (ptx::lane_id() != 0) return;
        ptx::bulk_wait_all();
        for (u32 s = 0; s < kSlots; ++s)
            if (expanded[s]) ptx::add_release(expanded[s], 1);
    }
    MEGA_DEVICE void load(PackedPiece& piece, u32 i) const {
        const Piece from = at(i);
        piece.load(from.codes, from.exponents);
    }

    /// The weights lane: until the tile's weights are there.
    MEGA_DEVICE static void wait(const Params& p, const Tile& tile) {
        const bool first = tile.kind == Tile::gemm1,
                   half = !first && C::kHidden % kBlockN != 0 && tile.n == TileOrder<C>::kTilesN2 - 1;
        const u32 column = tile.expert * kColumns + (first ? 0 : TileOrder<C>::kTilesN1) + tile.n;
        wait_counter(p, Wait::weights_expanded, p.expanded + column,
                     (first ? kColumnPieces1 : kColumnPieces2) >> half, column);
        ptx::fence_async_global();
    }
};

}   // namespace megamoe
