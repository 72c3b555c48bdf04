// Expands pieces of packed weights by the code of the kernels, one lane after the other.  Standard input: for each its codes, then
// its exponents.  Standard output: its tile.  Argument: `rows`, from memory as prefill does it, or `groups`, from shared memory as the
// helpers of unpack do.  Or `banks`: how many words of a bank the lanes of a warp want at once, at most, where they read what they
// multiply and where they are helpers.
#include <cstdio>
#include <cstring>

#include "base/types.cuh"

#include "expand/unpack.cuh"

using namespace megamoe;

constexpr u32 kTile = 1024, kPacked = kTile + PackedPiece::kBytes;   // addresses in shared memory

void expand_groups(u32 thread) {
    PackedGroups rows;
    const PackedGroups::Offsets offsets(thread);
    rows.load(kPacked, kPacked + PackedPiece::kCodeBytes, 0, offsets);
    rows.store_row(kTile, 0, offsets, 0), rows.store_row(kTile, 0, offsets, 1);
}
void expand_rows(const u8* given) {
    PackedPiece piece;
    piece.load(given, given + PackedPiece::kCodeBytes);
    piece.expand(kTile);
}

/// The worst of all warps of a warpgroup, each of whose threads does this.
template <class Do> u32 worst_of_warps(Do each) {
    u32 worst = 0;
    for (u32 warp = 0; warp < kGroupWarps; ++warp) {
        for (auto& of_lane : ptx::accesses) of_lane.clear();
        for (ptx::current_lane = 0; ptx::current_lane < kWarp; ++ptx::current_lane) each(warp * kWarp + ptx::current_lane);
        worst = std::max(worst, ptx::worst_bank());
    }
    return worst;
}

int main(int, char** words) {
    const bool groups = !std::strcmp(words[1], "groups");
    if (!std::strcmp(words[1], "banks")) {
        const u32 multiplied = worst_of_warps([](u32 thread) {
            PackedRows rows;
            rows.load(kPacked, kPacked + PackedPiece::kCodeBytes, 0, packed_place(thread));
        });
        std::printf("%u %u\n", multiplied, worst_of_warps(expand_groups));
        return 0;
    }
    u8* given = ptx::shared_memory + kPacked;
    const u32 size = PackedPiece::kCodeBytes + PackedPiece::kExponentBytes;
    while (std::fread(given, 1, size, stdin) == size) {
        std::memset(ptx::shared_memory + kTile, 0xFF, PackedPiece::kBytes);
        for (u32 thread = 0; thread < (groups ? kGroup : kWarp); ++thread) {
            ptx::current_lane = thread % kWarp;
            if (groups) expand_groups(thread);
            else expand_rows(given);
        }
        ptx::store_matrices();
        std::fwrite(ptx::shared_memory + kTile, 1, PackedPiece::kBytes, stdout);
    }
}
