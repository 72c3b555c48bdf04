// What a warpgroup's threads hold of packed weights, as the tensor cores read it.  Argument: rows of the tile.  Standard input:
// its k-blocks, each as a stage has it, codes and then exponents.  Standard output: for each, [64 rows][thread][k32][register].
#include "sim/engine.h"

#include "formats/mxfp4.cuh"

void sim::run_kernel(Block&) {}

int main(int, char** arguments) {
    using namespace megamoe;
    const u32 rows = std::atoi(arguments[1]), codes = rows * kBlockK * Mxfp4::kBits / 8, exponents = rows * kBlockK / Mxfp4::kGroup;
    std::vector<u8> stage(codes + exponents);
    auto block = std::make_unique<sim::Block>();
    block->shared = stage.data(), block->shared_bytes = codes + exponents;
    sim::Warp& warp = block->warps[0];
    warp.block = block.get(), warp.lanes[0].warp = &warp;
    sim::now = &warp.lanes[0];
    while (std::fread(stage.data(), 1, stage.size(), stdin) == stage.size())
        for (u32 m = 0; m < rows / 64; ++m)
            for (u32 thread = 0; thread < kGroup; ++thread) {
                Mxfp4::Rows operand;
                operand.load(0, codes, m, packed_place(thread));
                std::fwrite(operand.a, 1, sizeof operand.a, stdout);
            }
}
