// Expands pieces of packed weights by the code of the kernels, one lane after the other.  Standard input: for each its codes, then
// its exponents.  Standard output: its tile.  Argument: `rows`, from memory as prefill does it, or `groups`, from shared memory as the
// helpers of unpack do.
#include <cstdio>
#include <cstring>

#include "base/types.cuh"

#include "expand/unpack.cuh"

using namespace megamoe;

constexpr u32 kTile = 1024, kPacked = kTile + PackedPiece::kBytes;   // addresses in shared memory

int main(int count, char** words) {
    const bool groups = count > 1 && !std::strcmp(words[1], "groups");
    u8* given = ptx::shared_memory + kPacked;
    const u32 size = PackedPiece::kCodeBytes + PackedPiece::kExponentBytes;
    while (std::fread(given, 1, size, stdin) == size) {
        std::memset(ptx::shared_memory + kTile, 0xFF, PackedPiece::kBytes);
        for (u32 thread = 0; thread < (groups ? kGroup : kWarp); ++thread) {
            ptx::current_lane = thread % kWarp;
            if (groups) {
                PackedGroups rows;
                rows.load(kPacked, kPacked + PackedPiece::kCodeBytes, 0, thread);
                rows.unpack(kTile, 0, thread, 0), rows.unpack(kTile, 0, thread, 1);
            } else {
                PackedPiece piece;
                piece.load(given, given + PackedPiece::kCodeBytes);
                piece.expand(kTile);
            }
        }
        ptx::store_matrices();
        std::fwrite(ptx::shared_memory + kTile, 1, PackedPiece::kBytes, stdout);
    }
}
