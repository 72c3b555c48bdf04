// The scales of a k-block: written into the stage by the weights lane, read by the main loops.
//
// A tile of 256 columns has two weight scales per k-block.  GEMM 1: gate and up columns alternate by eights, so even groups of eight
// take the gate's scale and odd ones the up's.  GEMM 2: the first 128 columns take one, the others the second.  The weights lane
// stores them as four floats, (even, odd) for columns 0-127 and (even, odd) for columns 128-255, so one main loop serves both GEMMs
// and spends no register on the difference.
#pragma once
#include "layout/shared.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// The producer's side, in the weights lane: reads the two rows of weight scales of a tile, one k-block ahead.
template <class C> struct WeightScaleStream {
    static constexpr u32 kRows1 = 2 * C::kIntermediate / kQuantBlock,
                         kRows2 = C::kHidden / kQuantBlock;
    static constexpr u32 kBlocks1 = C::kHidden / kQuantBlock,
                         kBlocks2 = C::kIntermediate / kQuantBlock;

    bool interleaved;
    const float *first, *second;
    float next[2];

    /// Starts the loads of a tile's first k-block.
    MEGA_DEVICE void start(const Params& p, const Tile& tile) {
        interleaved = tile.kind == Tile::gemm1;
        if (interleaved) {
            first = p.weight1_scales + (tile.expert * kRows1 + tile.n) * kBlocks1;
            second = first + kRows1 / 2 * kBlocks1;
        } else {
            first = p.weight2_scales + (tile.expert * kRows2 + 2 * tile.n) * kBlocks2;
            // the last tile may be half as wide
            second = 2 * tile.n + 1 < kRows2 ? first + kBlocks2 : first;
        }
        fetch(0);
    }
    MEGA_DEVICE void fetch(u32 k) { next[0] = __ldg(first + k), next[1] = __ldg(second + k); }

    /// Writes this k-block's scales to shared memory; if there is a next one, starts its loads.
    MEGA_DEVICE void store(u32 address, u32 k, bool more) {
        const float a = next[0], b = next[1];
        if (more) fetch(k + 1);
        ptx::store_floats_shared(address, a, interleaved ? b : a, interleaved ? a : b, b);
    }
};

/// The consumer's side: what a thread needs of a stage's scales.
struct BlockScales {
    float act[2];         // rows t/4 and t/4 + 8 of this warp
    float weight[2][2];   // columns 0-127 and 128-255; even and odd groups of eight

    /// `act_scales`: address of the scale of this thread's first row; that of its second lies eight rows on.
    MEGA_DEVICE void load(u32 act_scales, u32 weight_scales) {
        act[0] = ptx::load_float_shared(act_scales),
        act[1] = ptx::load_float_shared(act_scales + 32);
        ptx::load_floats_shared(weight_scales, weight[0][0], weight[0][1], weight[1][0],
                                weight[1][1]);
    }
};

}   // namespace megamoe
