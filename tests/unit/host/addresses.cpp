// How far into their sections and matrices the kernels reach with the last expert, row and pair of a large layer, in bytes: by the
// code of the kernels, with everything at address 0 but what tells sections apart.  Standard output: a name and a number a line.
#include <cstdio>

#include "sim/engine.h"

#include "kernels/megamoe.cuh"
#include "variants/prefill.cuh"
#include "variants/decode.cuh"
#include "formats/fp8e5m2.cuh"
#include "formats/mxfp4.cuh"

void megamoe::ptx::gave_up(u32, u32, u32, u32) {}
void sim::run_kernel(Block&) {}

using namespace megamoe;

template <class P, class W> struct Config {
    using Policy = P;
    using Weights = W;
    static constexpr u32 kBlockM = P::kBlockM, kHidden = HIDDEN, kIntermediate = INTERMEDIATE, kExperts = EXPERTS, kRanks = 2;
    static constexpr u32 kLocalExperts = EXPERTS / 2, kTopK = TOPK, kShared = 0, kStages = 3, kDispatchSlots = 2;
    static constexpr bool kFastMath = true, kFloat32Out = false, kTimeline = false;
    static constexpr Inputs kInputs = Inputs::staged;
};

static void say(const char* name, const void* address) { std::printf("%s %llu\n", name, reinterpret_cast<u64>(address)); }

template <class C> static Tile last(u32 kind) {
    Tile tile = {};
    tile.kind = kind, tile.expert = C::kLocalExperts - 1;
    tile.n = (kind == Tile::gemm1 ? TileOrder<C>::kTilesN1 : TileOrder<C>::kTilesN2) - 1;
    tile.k_blocks = (kind == Tile::gemm1 ? C::kHidden : C::kIntermediate) / kBlockK;
    return tile;
}

int main() {
    using Fp8Kernel = Config<Prefill, Fp8E5M2>;
    static u8 stages[1024];
    auto block = std::make_unique<sim::Block>();
    block->shared = stages, block->shared_bytes = sizeof stages;
    block->warps[0].block = block.get(), block->warps[0].lanes[0].warp = &block->warps[0];
    sim::now = &block->warps[0].lanes[0];
    static Params p = {};
    const u32 pair = TOKENS * TOPK - 1, origin = 1u << kPairBits | pair;   // of the second rank
    static const u32 none[] = {0, 0, 0, 0};
    const ExpertTable table{none, none, none, nullptr, 1, 0, 0};
    const Shared<Fp8Kernel> shared(stages);
    const Gather<Fp8Kernel> gather(p, shared, table);
    say("combine", combine_row<Fp8Kernel>(p, origin));
    say("x", gather.row_address(origin));
    say("x_scales", gather.row_scales(origin));
    say("weight1", CodesAlone<Fp8Kernel>(p, last<Fp8Kernel>(Tile::gemm1)).from);
    say("weight2", CodesAlone<Fp8Kernel>(p, last<Fp8Kernel>(Tile::gemm2)).from);
    using PackedKernel = Config<Decode, Mxfp4>;
    const Mxfp4::CodeStream<PackedKernel> codes(p, last<PackedKernel>(Tile::gemm1));
    say("weight1_packed", codes.codes);
    say("weight1_exponents", codes.exponents);
    using Placed = Config<Cooperative, Fp8>;
    const Shared<Placed> placed(stages);
    say("act1_pool", Gather<Placed>(p, placed, table).row_address(Places<Placed>::kHere + POOL_ROWS - 1));
    using E = Expansion<Fp8Kernel>;
    say("packed1", typename E::Piece{p, true, Fp8Kernel::kLocalExperts * E::kPieces1 - 1, 0}.codes());
    say("expanded1", typename E::Piece{p, true, Fp8Kernel::kLocalExperts * E::kPieces1 - 1, 0}.to());
    say("expanded2", typename E::Piece{p, false, Fp8Kernel::kLocalExperts * E::kPieces2 - 1, 0}.to());
}
