// Prefill: packed weights are expanded to e5m2 in memory before the matrix work reads them, each once per launch, whatever the number
// of rows.  `Expansion::run` is called by the head (kernels/megamoe.cuh), `wait` by the weights lane (roles/load.cuh).
//
// Packed and expanded weights lie in the same order, tile by tile and k-block by k-block.  The unit of work is a piece, 64 rows of a
// k-block: 4096 bytes of codes and 256 of exponents become 8192 bytes of e5m2 at the same place of the matrix.  A warp takes a piece
// through registers into shared memory, and a bulk store writes it to memory.
//
//   expanded[expert][column]   released here, once per piece     acquired by the weights lane of any block
//
// A block that expands waits for nothing but memory.  Only experts that have rows are expanded, in the order in which tiles need them.
#pragma once
#include "comm/fault.cuh"
#include "expand/unpack.cuh"
#include "layout/shared.cuh"
#include "ptx/tma.cuh"
#include "sched/order.cuh"

namespace megamoe {

/// Which blocks expand: one of `expand_every`, with all its warps, before its first tile.  These few are as fast as the memory, and the
/// other blocks begin on the first experts meanwhile.  Only those others dispatch what the head has left, since an expander would come
/// to it late.  Where that leaves no blocks for one of the two, all blocks do both.
struct ExpandShare {
    u32 expander, expanders;       // which expander this block is (`expanders`: none), of how many
    u32 dispatcher, dispatchers;   // the same of the blocks that dispatch

    MEGA_DEVICE explicit ExpandShare(const Params& p) {
        const u32 block = blockIdx.x, all = gridDim.x,
                  every = p.expand_every > 0 ? p.expand_every : all;
        expanders = all / every, dispatchers = all - expanders;
        const bool one = block % every == every - 1;
        expander = one ? block / every : expanders,
        dispatcher = one ? dispatchers : block - block / every;
        if (expanders == 0 || dispatchers == 0)   // all do both
            expander = dispatcher = block, expanders = dispatchers = all;
    }
    MEGA_DEVICE bool expands() const { return expander < expanders; }
    MEGA_DEVICE bool dispatches() const { return dispatcher < dispatchers; }
};

template <class C> struct Expansion {
    static constexpr u32 kColumnPieces1 = kBlockN / PackedPiece::kRows * (C::kHidden / kBlockK),
                         kColumnPieces2 = kBlockN / PackedPiece::kRows *
                                          (C::kIntermediate / kBlockK);
    static constexpr u32 kPieces1 = 2 * C::kIntermediate / PackedPiece::kRows *
                                    (C::kHidden / kBlockK),
                         kPieces2 = C::kHidden / PackedPiece::kRows * (C::kIntermediate / kBlockK),
                         kPieces = kPieces1 + kPieces2;   // of an expert
    static constexpr u32 kColumns = TileOrder<C>::kTilesN1 + TileOrder<C>::kTilesN2;
    // pieces of a warp in shared memory at a time, in the room of the stages
    static constexpr u32 kSlots = min_u32(
        2, Shared<C>::kStagingAt / (kBlockWarps<C> * PackedPiece::kBytes));
    static_assert(kSlots > 0, "no room to expand weights in");

    const Params& p;
    const Shared<C>& shared;
    const ExpertTable& table;

    /// How many pieces all experts that have rows have together.
    MEGA_DEVICE u32 pieces() const { return table.active_experts * kPieces; }

    /// A piece: of which matrix (`first`: GEMM 1), its number among the pieces of that matrix of all experts, and its word of `expanded`.
    /// Addresses are computed from it where they are needed, to save registers.
    struct Piece {
        const Params& p;
        bool first;
        u32 place, column;

        MEGA_DEVICE const u8* codes() const {
            return (first ? p.packed1 : p.packed2) + u64(place) * PackedPiece::kCodeBytes;
        }
        MEGA_DEVICE const u8* exponents() const {
            return (first ? p.weight1_exponents : p.weight2_exponents) +
                   u64(place) * PackedPiece::kExponentBytes;
        }
        MEGA_DEVICE u8* to() const {
            return (first ? p.expanded1 : p.expanded2) + u64(place) * PackedPiece::kBytes;
        }
        MEGA_DEVICE void done() const {
            ptx::fence_async_global();   // after its bulk store, which lane 0 has waited for
            ptx::add_release(p.expanded + column, 1);
        }
    };
    /// Piece `i` in the order in which tiles need them.
    MEGA_DEVICE Piece at(u32 i) const {
        const u32 expert = table.active[i / kPieces], own = i % kPieces;
        const bool first = own < kPieces1;
        const u32 inside = first ? own : own - kPieces1;
        const u32 column = first ? inside / kColumnPieces1
                                 : TileOrder<C>::kTilesN1 + inside / kColumnPieces2;
        return {p, first, expert * (first ? kPieces1 : kPieces2) + inside,
                expert * kColumns + column};
    }

    /// Expands this block's share of all pieces, by all its warps, in the room of the stages, which nobody else uses yet: the block must
    /// meet before its first tile.  Each warp has up to kSlots bulk stores under way, and loads its next piece meanwhile.
    MEGA_DEVICE void run() const {
        const ExpandShare share(p);
        if (!share.expands()) return;
        const u32 warp = ptx::warp_id(), workers = kBlockWarps<C> * share.expanders, end = pieces();
        const u32 begin = warp * share.expanders + share.expander;
        const u32 room = shared.address + warp * (kSlots * PackedPiece::kBytes);
        const bool one = ptx::lane_id() == 0;
        PackedPiece next;
        if (begin < end) load(next, begin);
        u32 slot = 0;
#pragma unroll 1
        for (u32 i = begin; i < end; i += workers, slot = (slot + 1) % kSlots) {
            const PackedPiece piece = next;
            if (i + workers < end) load(next, i + workers);
            if (one) {
                ptx::bulk_wait<kSlots - 1>();
                if (i >= begin + kSlots * workers) at(i - kSlots * workers).done();
            }
            __syncwarp();
            piece.expand(room + slot * PackedPiece::kBytes);
            ptx::fence_async_shared();
            __syncwarp();
            if (one)
                ptx::bulk_store(at(i).to(), room + slot * PackedPiece::kBytes, PackedPiece::kBytes);
        }
        if (!one) return;
        ptx::bulk_wait_all();
        const u32 count = begin < end ? ceil_div(end - begin, workers) : 0;
        for (u32 i = count > kSlots ? count - kSlots : 0; i < count; ++i)
            at(begin + i * workers).done();
    }
    MEGA_DEVICE void load(PackedPiece& piece, u32 i) const {
        const Piece from = at(i);
        piece.load(from.codes(), from.exponents());
    }

    /// The weights lane: waits until the tile's weights are expanded.
    MEGA_DEVICE static void wait(const Params& p, const Tile& tile) {
        const bool first = tile.kind == Tile::gemm1,
                   half = !first && TileOrder<C>::kHasHalf && tile.n == TileOrder<C>::kTilesN2 - 1;
        const u32 column = tile.expert * kColumns + (first ? 0 : TileOrder<C>::kTilesN1) + tile.n;
        wait_counter(p, Wait::weights_expanded, p.expanded + column,
                     (first ? kColumnPieces1 : kColumnPieces2) >> half, column);
        ptx::fence_async_global();
    }
};

}   // namespace megamoe
