// Expands pieces of packed weights by the code of the kernels, one lane after the other.  Standard input: for each its codes, then
// its exponents.  Standard output: its tile.  Argument: how many matrices an `stmatrix` stores, 2 or 4.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/types.cuh"

#include "expand/unpack.cuh"

using namespace megamoe;

int main(int count, char** words) {
    const bool four = count > 1 && std::atoi(words[1]) == 4;
    static u8 given[PackedPiece::kCodeBytes + PackedPiece::kExponentBytes];
    while (std::fread(given, 1, sizeof given, stdin) == sizeof given) {
        for (ptx::current_lane = 0; ptx::current_lane < kWarp; ++ptx::current_lane) {
            PackedPiece piece;
            piece.load(given, given + PackedPiece::kCodeBytes);
            if (four) piece.expand<4>(1024);
            else piece.expand<2>(1024);
        }
        ptx::store_matrices();
        std::fwrite(ptx::shared_memory + 1024, 1, PackedPiece::kBytes, stdout);
    }
}
