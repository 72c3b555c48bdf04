// Weights of four bits are expanded in memory before the matrix work reads them: each once, whatever the number of rows.
//
// Packed and expanded weights lie in the same order, tile by tile and k-block by k-block, so 64 rows of a k-block are a piece:
// 4096 bytes of codes and 256 of exponents become 8192 of e5m2, at the same place in their matrix.  A warp takes a piece through
// registers into shared memory and has the bulk copy engine write it.
//
//   expanded[expert][column]   released here, once per piece     acquired by the weights lane of any block (roles/load.cuh)
//
// Nobody waits here for anything but memory.  Only experts that have rows are expanded, in the order in which tiles need them: some
// at the head, by all warps; the others by the dispatch warp of each block, an expert ahead of the rows that it brings.
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
        MEGA_DEVICE void done() const { ptx::add_release(p.expanded + column, 1); }
    };
    MEGA_DEVICE Piece at(u32 i) const {
        const u32 expert = table.active[i / kPieces], own = i % kPieces;
        const bool first = own < kPieces1;
        const u32 inside = first ? own : own - kPieces1;
        const u32 column = first ? inside / kColumnPieces1
                                 : TileOrder<C>::kTilesN1 + inside / kColumnPieces2;
        return {p, first, expert * (first ? kPieces1 : kPieces2) + inside, expert * kColumns + column};
    }

    /// Pieces that are expanded at the head, by all warps: what the first tiles need.  The dispatch warps do the others
    /// beside the matrix work (`Beside`), unless they may have to wait for it, when the pools are rings.
    MEGA_DEVICE u32 at_the_head() const {
        const bool ring = table.blocks() > p.pool_rows / kPoolAlign;
        return ring || !kBeside ? pieces() : min_u32(pieces(), kPieces1);
    }
    static constexpr bool kBeside = C::kDispatchSlots * kDispatchChunk >= PackedPiece::kBytes;

    /// They are expanded in the stages, which nobody else uses yet.
    MEGA_DEVICE void head() const {
        const u32 warp = ptx::warp_id(), workers = kWarps * gridDim.x, end = at_the_head();
        const bool one = ptx::lane_id() == 0;
        const u32 room = shared.address + warp * (kSlots * PackedPiece::kBytes);
        PackedPiece next;
        const u32 begin = warp * gridDim.x + blockIdx.x;
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
            piece.unpack(room + slot * PackedPiece::kBytes);
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

    /// Pieces `next`, `next` + blocks, ... below `end`, by the dispatch warp, in its slots, half a piece in each half; returns the first
    /// that is left.  While half a piece is unpacked, the next half is on its way.
    MEGA_DEVICE u32 beside(u32 next, u32 end) const {
        constexpr u32 kHalf = PackedPiece::kBytes / 2;
        if (next >= end) return next;
        const bool one = ptx::lane_id() == 0;
        PackedRows upper, lower;   // of half a piece
        load(upper, next, 0), load(lower, next, 1);
        bool first = true;
#pragma unroll 1
        for (u32 half = 0; next < end; half ^= 1) {
            if (one) ptx::bulk_wait_read<1>();
            __syncwarp();
            const u32 room = shared.dispatch_slot(0) + half * kHalf;
            u32 then = half == 0 ? next : next + gridDim.x;
            if (then >= end) then = next;   // once more, in vain
            upper.unpack(room, 0), load(upper, then, 2 - 2 * half);
            lower.unpack(room, 1), load(lower, then, 3 - 2 * half);
            ptx::fence_async_shared();
            __syncwarp();
            if (one) ptx::bulk_store(at(next).to() + half * kHalf, room, kHalf);
            if (half == 0) continue;
            if (one && !first) ptx::bulk_wait<2>(), at(next - gridDim.x).done();
            first = false, next += gridDim.x;
        }
        if (one) ptx::bulk_wait_all(), at(next - gridDim.x).done();
        __syncwarp();   // the slots are free
        return next;
    }
    MEGA_DEVICE void load(PackedRows& rows, u32 i, u32 w) const {
        const Piece from = at(i);
        rows.load(from.codes(), from.exponents(), w);
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

/// What the dispatch warp does between its items.
template <class C> struct ExpandBeside {
    const Expansion<C> expansion;
    u32 next;         // piece of this block
    u32 active = 0;   // of the experts that have rows, the one whose rows are dispatched

    MEGA_DEVICE explicit ExpandBeside(const Expansion<C>& expansion_)
        : expansion(expansion_), next(expansion_.at_the_head() + blockIdx.x) {}

    /// Before an item of dispatch: the weights of its expert, but for those of the first, whose rows are wanted at once.  After the
    /// last one: all weights that are left.
    MEGA_DEVICE void operator()(u32 item) {
        const ExpertTable& table = expansion.table;
        u32 end = expansion.pieces();
        if (item < table.items[table.experts]) {
            const u32 expert = table.expert_in(table.items, item);
            while (table.active[active] != expert) ++active;
            end = active == 0 ? 0 : (active + 1) * Expansion<C>::kPieces;
        }
        next = expansion.beside(next, end);
    }
};

}   // namespace megamoe
