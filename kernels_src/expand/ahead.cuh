// Weights of four bits are expanded in memory before the matrix work reads them: each once, whatever the number of rows.
//
// Packed and expanded weights lie in the same order, tile by tile and k-block by k-block, so 64 rows of a k-block are a piece:
// 4096 bytes of codes and 256 of exponents become 8192 of e5m2, at the same place in their matrix.  A warp takes a piece through
// registers into shared memory and has the bulk copy engine write it.
//
//   expanded[expert][column]   released here, once per piece     acquired by the weights lane of any block (roles/load.cuh)
//
// Nobody waits here for anything but memory.  Only experts that have rows are expanded, in the order in which tiles need them.
#pragma once
#include "comm/fault.cuh"
#include "expand/unpack.cuh"
#include "layout/shared.cuh"
#include "ptx/tma.cuh"
#include "sched/order.cuh"

namespace megamoe {

/// Who expands: some blocks, with all their warps, before they do anything else.  A few are as fast as the memory, and the others
/// begin on the first experts meanwhile; they alone go on with dispatch, which must not wait for them.
struct ExpandShare {
    u32 expander, expanders;       // which of them this block is, if it is one; how many there are
    u32 dispatcher, dispatchers;   // the same of blocks that dispatch

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
    // pieces that a warp has in shared memory at the head, where the stages will be
    static constexpr u32 kSlots = min_u32(
        2, Shared<C>::kStagingAt / (kBlockWarps<C> * PackedPiece::kBytes));
    static_assert(kSlots > 0, "no room to expand weights in");

    const Params& p;
    const Shared<C>& shared;
    const ExpertTable& table;

    /// Pieces of all experts that have rows, in the order in which tiles need them.
    MEGA_DEVICE u32 pieces() const { return table.active_experts * kPieces; }

    /// A piece: of which matrix of its expert, and its number in that matrix of all experts.  Addresses are made of it where they are
    /// needed: registers are dear in the dispatch warp.
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
            ptx::fence_async_global();   // its bulk store, which has been waited for
            ptx::add_release(p.expanded + column, 1);
        }
    };
    MEGA_DEVICE Piece at(u32 i) const {
        const u32 expert = table.active[i / kPieces], own = i % kPieces;
        const bool first = own < kPieces1;
        const u32 inside = first ? own : own - kPieces1;
        const u32 column = first ? inside / kColumnPieces1
                                 : TileOrder<C>::kTilesN1 + inside / kColumnPieces2;
        return {p, first, expert * (first ? kPieces1 : kPieces2) + inside,
                expert * kColumns + column};
    }

    /// This block's share of all pieces, by all its warps, in the stages, which nobody else uses yet.
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

    /// The weights lane: until the tile's weights are there.
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
