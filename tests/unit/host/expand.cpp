// Expands pieces of packed weights by the code of the kernels, one lane after the other.  Standard input: for each its codes, then
// its exponents.  Standard output: its tile.
#include <cstdio>
#include <cstring>

#include "base/types.cuh"

#include "expand/unpack.cuh"

using namespace megamoe;

int main() {
    constexpr u32 kPiece = 1024, kTile = 8192, kSize = PackedPiece::kCodeBytes + PackedPiece::kExponentBytes;
    while (std::fread(ptx::shared_memory + kPiece, 1, kSize, stdin) == kSize) {
        for (ptx::current_lane = 0; ptx::current_lane < kWarp; ++ptx::current_lane) {
            for (u32 w = 0; w < 4; ++w) {
                PackedRows rows;
                rows.load(kPiece, kPiece + PackedPiece::kCodeBytes, w);
                rows.expand(kTile, w);
            }
        }
        std::fwrite(ptx::shared_memory + kTile, 1, PackedPiece::kBytes, stdout);
    }
}
