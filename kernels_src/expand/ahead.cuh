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
#include "comm/sides.cuh"
#include "expand/unpack.cuh"
#include "layout/shared.cuh"
#include "pipe/ring.cuh"
#include "ptx/tma.cuh"
#include "sched/order.cuh"

namespace megamoe {

/// Who expands: some blocks, with all their warps, before they do anything else.  A few are nearly as fast as the memory, and the
/// others begin on the first experts meanwhile; they alone go on with dispatch, which must not wait for them.  Each side of the L2
/// has its share, since each has half of the tiles to do.
struct ExpandShare {
    u32 expander, expanders;   // which of them this block is, if it is one; how many there are
    u32 taker, takers;         // the same of blocks that dispatch

    /// `rank`: which block of its side this is.
    MEGA_DEVICE ExpandShare(const Params& p, u32 side, u32 rank) {
        const u32 every = p.expand_every, all = gridDim.x;
        const SideCounts counted = counted_sides(p);
        const u32 of0 = p.want_sides ? counted.of0 : all, expanders0 = of0 / every;
        expanders = expanders0 + (all - of0) / every, takers = all - expanders;
        const bool one = rank % every == every - 1;
        expander = one ? rank / every + (side ? expanders0 : 0) : expanders;
        taker = one ? takers : rank - rank / every + (side ? of0 - expanders0 : 0);
        if (expanders == 0 || takers == 0)   // all do both
            expander = taker = blockIdx.x, expanders = takers = all;
    }
    MEGA_DEVICE bool expands() const { return expander < expanders; }
};

template <class C> struct Expansion {
    static constexpr u32 kColumnPieces1 = kBlockN / PackedPiece::kRows * (C::kHidden / kBlockK),
                         kColumnPieces2 = kBlockN / PackedPiece::kRows * (C::kIntermediate / kBlockK);
    static constexpr u32 kPieces1 = 2 * C::kIntermediate / PackedPiece::kRows * (C::kHidden / kBlockK),
                         kPieces2 = C::kHidden / PackedPiece::kRows * (C::kIntermediate / kBlockK),
                         kPieces = kPieces1 + kPieces2;   // of an expert
    static constexpr u32 kColumns = TileOrder<C>::kTilesN1 + TileOrder<C>::kTilesN2;
    // a warp's room at the head, where the stages will be: packed pieces on their way, with their barriers, and an expanded one
    static constexpr u32 kPackedBytes = PackedPiece::kCodeBytes + PackedPiece::kExponentBytes,
                         kInFlight = 3, kBarriersAt = PackedPiece::kBytes + kInFlight * kPackedBytes,
                         kRoom = ceil_div(kBarriersAt + kInFlight * 8, 1024u) * 1024,
                         kExpandWarps = min_u32(kBlockWarps<C>, Shared<C>::kStagingAt / kRoom);
    static_assert(kExpandWarps > 0, "no room to expand weights in");

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

    /// This block's share of all pieces, by as many of its warps as have room in the stages, which nobody else uses yet.
    MEGA_DEVICE void run(const ExpandShare& share) const {
        const u32 warp = ptx::warp_id();
        if (!share.expands() || warp >= kExpandWarps) return;
        const u32 workers = kExpandWarps * share.expanders, end = pieces(), room = shared.address + warp * kRoom;
        const u32 begin = warp * share.expanders + share.expander;
        const bool one = ptx::lane_id() == 0;
        if (one) {
#pragma unroll 1
            for (u32 s = 0; s < kInFlight; ++s) ptx::mbarrier_init(room + kBarriersAt + s * 8, 1);
            ptx::mbarrier_init_fence();
#pragma unroll 1
            for (u32 s = 0; s < kInFlight; ++s) fetch(room, s, begin + s * workers, end);
        }
        __syncwarp();
        Ring<kInFlight> from;
#pragma unroll 1
        for (u32 i = begin; i < end; i += workers, from.advance()) {
            while (!ptx::mbarrier_try_wait(room + kBarriersAt + from.stage * 8, from.parity)) {}
            const u32 packed = room + PackedPiece::kBytes + from.stage * kPackedBytes;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {   // of the piece's rows
                PackedRows rows[2];
#pragma unroll
                for (u32 w = 0; w < 2; ++w)
                    rows[w].load(packed, packed + PackedPiece::kCodeBytes, half * 2 + w);
                if (one) ptx::bulk_wait_read<1>();   // the half that lay there before
                __syncwarp();
                rows[0].expand(room, half * 2), rows[1].expand(room, half * 2 + 1);
                ptx::fence_async_shared();
                __syncwarp();
                constexpr u32 kHalf = PackedPiece::kBytes / 2;
                if (one) ptx::bulk_store(at(i).to() + half * kHalf, room + half * kHalf, kHalf);
            }
            if (!one) continue;
            fetch(room, from.stage, i + kInFlight * workers, end);
            if (i == begin) continue;
            ptx::bulk_wait<2>();   // all but this piece's
            at(i - workers).done();
        }
        if (!one || begin >= end) return;
        ptx::bulk_wait_all();
        at(begin + (end - 1 - begin) / workers * workers).done();
    }
    /// Starts the copies of a piece, if there is one.
    MEGA_DEVICE void fetch(u32 room, u32 slot, u32 i, u32 end) const {
        if (i >= end) return;
        const Piece from = at(i);
        const u32 bar = room + kBarriersAt + slot * 8, to = room + PackedPiece::kBytes + slot * kPackedBytes;
        ptx::mbarrier_expect(bar, kPackedBytes);
        ptx::bulk_load(to, from.codes(), PackedPiece::kCodeBytes, bar);
        ptx::bulk_load(to + PackedPiece::kCodeBytes, from.exponents(), PackedPiece::kExponentBytes, bar);
        ptx::mbarrier_arrive(bar);
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
