// Rows between nodes, where each goes to those that have experts for it: who that is, rows packed for one collective and
// unpacked again, and the sum of what comes back.  Packed rows lie by node, and by token within it.
#pragma once
#include "base/constants.cuh"
#include "dispatch/scan.cuh"
#include "ptx/control.cuh"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

constexpr u32 kNodesThreads = 256, kNodesWarps = kNodesThreads / kWarp;
// codes, scales, ids and weights of a row
constexpr u32 kRowParts = 4, kIdsPart = 2;

struct alignas(64) NodesParams {
    u32* parts[kRowParts];   // [tokens or rows][part_words]
    u32* packed;             // [rows][all part_words]
    u32* places;             // [nodes][tokens]: which row of the node's, from 1 on; 0 for none
    u64* counts;             // [nodes]: its rows
    const u8* back;          // [rows][hidden], bf16 or float
    u8* y;                   // bf16 [tokens][hidden]
    u32 part_words[kRowParts];
    u32 nodes, tokens, topk, experts;
    // of all nodes, or of each where there are no places
    u32 rows;
    u32 first_expert, hidden;
    u32 unused[3];
};
static_assert(sizeof(NodesParams) == 128, "NodesParams changed: run `make abi`");

MEGA_DEVICE u32 row_words(const NodesParams& p) {
    u32 words = 0;
#pragma unroll
    for (u32 i = 0; i < kRowParts; ++i) words += p.part_words[i];
    return words;
}

/// The places of one node, by one block; and how many there are.
MEGA_DEVICE void route_rows(const NodesParams& p) {
    constexpr u32 kEach = 4;   // tokens of a thread, side by side
    __shared__ u32 of_warp[kNodesWarps];
    const u64* ids = reinterpret_cast<const u64*>(p.parts[kIdsPart]);
    const u64 first = u64(blockIdx.x) * p.experts;
    u32* places = p.places + u64(blockIdx.x) * p.tokens;
    const u32 warp = ptx::warp_id();   // by a shuffle, which all lanes have to be in
    u32 before = 0;
    for (u32 begin = 0; begin < p.tokens; begin += kEach * kNodesThreads) {
        const u32 token = begin + kEach * threadIdx.x;
        u32 wanted = 0;
#pragma unroll
        for (u32 j = 0; j < kEach; ++j)
            for (u32 slot = 0; token + j < p.tokens && slot < p.topk; ++slot)
                wanted |= u32(ids[u64(token + j) * p.topk + slot] - first < p.experts) << j;
        WarpScan scan;
        u32 place = before + scan.exclusive(__popc(wanted));
        if (ptx::lane_id() == 0) of_warp[warp] = scan.total;
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < kNodesWarps; ++i) {
            if (i < warp) place += of_warp[i];
            before += of_warp[i];
        }
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < kEach; ++j)
            if (token + j < p.tokens) places[token + j] = wanted >> j & 1 ? ++place : 0;
    }
    if (threadIdx.x == 0) p.counts[blockIdx.x] = before;
}

/// By a warp, with loads in flight.
MEGA_DEVICE void copy_words(u32* to, const u32* from, u32 words) {
    constexpr u32 kFlight = 8;
    for (u32 begin = ptx::lane_id(); begin < words; begin += kFlight * kWarp) {
        u32 v[kFlight];
#pragma unroll
        for (u32 j = 0; j < kFlight; ++j)
            if (begin + j * kWarp < words) v[j] = from[begin + j * kWarp];
#pragma unroll
        for (u32 j = 0; j < kFlight; ++j)
            if (begin + j * kWarp < words) to[begin + j * kWarp] = v[j];
    }
}

MEGA_DEVICE void pack_rows(const NodesParams& p) {
    const u32 warps = gridDim.x * kNodesWarps;
    for (u32 pair = blockIdx.x * kNodesWarps + ptx::warp_id(); pair < p.nodes * p.tokens;
         pair += warps) {
        const u32 place = p.places[pair], node = pair / p.tokens, token = pair - node * p.tokens;
        if (place == 0) continue;
        u64 row = place - 1;
        for (u32 i = 0; i < node; ++i) row += p.counts[i];
        u32* to = p.packed + row * row_words(p);
#pragma unroll
        for (u32 i = 0; i < kRowParts; ++i) {
            copy_words(to, p.parts[i] + u64(token) * p.part_words[i], p.part_words[i]);
            to += p.part_words[i];
        }
    }
}

/// Ids arrive as all nodes count them, and are counted from this node's first from here on.
MEGA_DEVICE void unpack_rows(const NodesParams& p) {
    const u32 warps = gridDim.x * kNodesWarps;
    for (u32 row = blockIdx.x * kNodesWarps + ptx::warp_id(); row < p.rows; row += warps) {
        const u32* from = p.packed + u64(row) * row_words(p);
#pragma unroll
        for (u32 i = 0; i < kRowParts; ++i) {
            u32* to = p.parts[i] + u64(row) * p.part_words[i];
            if (i != kIdsPart) {
                copy_words(to, from, p.part_words[i]);
            } else {
                for (u32 slot = ptx::lane_id(); slot < p.topk; slot += kWarp)
                    reinterpret_cast<u64*>(to)[slot] = (u64(from[2 * slot + 1]) << 32 |
                                                        from[2 * slot]) -
                                                       p.first_expert;
            }
            from += p.part_words[i];
        }
    }
}

/// Eight numbers of a row of bf16, or of float.
template <bool kWide> MEGA_DEVICE void load_eight(const u8* row, u32 vector, float (&v)[8]) {
    if constexpr (kWide) {
        const Vec16 a = ptx::load16(row + vector * 32), b = ptx::load16(row + vector * 32 + 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            v[i] = __uint_as_float(a.w[i]), v[4 + i] = __uint_as_float(b.w[i]);
    } else {
        const Vec16 a = ptx::load16(row + vector * 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            v[2 * i] = __uint_as_float(a.w[i] << 16);
            v[2 * i + 1] = __uint_as_float(a.w[i] & 0xFFFF0000);
        }
    }
}

/// One node after the other, in FP32, rounded once at the end; zeros where a node was sent nothing.
template <bool kWide> MEGA_DEVICE void sum_nodes(const NodesParams& p) {
    const u32 vectors = p.hidden / 8, at = blockIdx.x * kNodesThreads + threadIdx.x;
    const u32 token = at / vectors, vector = at - token * vectors;
    if (token >= p.tokens) return;
    float total[8];
    u64 first = 0;
    for (u32 node = 0; node < p.nodes; ++node) {
        const u32 place = p.places == nullptr ? token + 1 : p.places[u64(node) * p.tokens + token];
        float v[8] = {};
        if (place != 0)
            load_eight<kWide>(p.back + (first + place - 1) * p.hidden * (kWide ? 4 : 2), vector, v);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) total[i] = node == 0 ? v[i] : total[i] + v[i];
        first += p.places == nullptr ? p.rows : p.counts[node];
    }
    Vec16 out;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) out.w[i] = ptx::pack_bf16(total[2 * i], total[2 * i + 1]);
    ptx::store16(p.y + u64(at) * 16, out);
}

}   // namespace megamoe
