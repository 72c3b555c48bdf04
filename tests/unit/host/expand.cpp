// Expands pieces of packed weights by the code of the kernels, one lane after the other.  Standard input: for each its codes, then
// its exponents.  Standard output: its tile.
#include <cstdio>
#include <cstring>

#include "base/types.cuh"

static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned from = selector >> 4 * i & 7;
        result |= ((from < 4 ? a >> 8 * from : b >> 8 * (from - 4)) & 0xFF) << 8 * i;
    }
    return result;
}

#include "expand/unpack.cuh"

using namespace megamoe;

int main() {
    static u8 given[PackedPiece::kCodeBytes + PackedPiece::kExponentBytes];
    while (std::fread(given, 1, sizeof given, stdin) == sizeof given) {
        for (ptx::current_lane = 0; ptx::current_lane < kWarp; ++ptx::current_lane) {
            PackedPiece piece;
            piece.load(given, given + PackedPiece::kCodeBytes);
            piece.unpack(1024);
        }
        std::fwrite(ptx::shared_memory + 1024, 1, PackedPiece::kBytes, stdout);
    }
}
