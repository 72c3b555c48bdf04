// The tile order of the kernels as a shared library for tests/unit/kernels/test_order.py.
#include "sched/order.cuh"

namespace {

using megamoe::ExpertTable;
using megamoe::Tile;
using megamoe::u16;
using megamoe::u32;

/// What a kernel's template defines (kernels/entry.cuh.j2), as far as the order depends on it.
template <u32 kBlockM_, u32 kHidden_, u32 kIntermediate_> struct Config {
    static constexpr u32 kBlockM = kBlockM_;
    static constexpr u32 kHidden = kHidden_, kIntermediate = kIntermediate_;
};

struct Run {
    u32 lag, pool_rows, side;
};

/// One walker per call, like one block of threads per launch; seven words per ticket.
template <class C> void walk(const ExpertTable& table, const Run& run, const u32* tickets, u32 count, u32* out) {
    megamoe::TileOrder<C> order(table, run.lag, run.pool_rows, run.side);
    for (u32 i = 0; i < count; ++i) {
        const Tile tile = order.locate(tickets[i]);
        const u32 words[7] = {tile.kind, tile.expert, tile.n, tile.row, tile.rows, tile.k_blocks, tile.pool_row};
        for (u32 w = 0; w < 7; ++w) out[7 * i + w] = words[w];
    }
}

template <u32 kHidden, u32 kIntermediate>
bool walk(u32 block_m, const ExpertTable& table, const Run& run, const u32* tickets, u32 count, u32* out) {
    if (block_m == 64) walk<Config<64, kHidden, kIntermediate>>(table, run, tickets, count, out);
    else if (block_m == 80) walk<Config<80, kHidden, kIntermediate>>(table, run, tickets, count, out);
    else if (block_m == 128) walk<Config<128, kHidden, kIntermediate>>(table, run, tickets, count, out);
    else return false;
    return true;
}

}  // namespace

extern "C" u32 even_enough(u32 blocks0, u32 blocks1) { return megamoe::even_enough(blocks0, blocks1); }

/// False when these sizes are not built in.
extern "C" bool locate(u32 hidden, u32 intermediate, u32 block_m, const u32* rows, const u32* bases, const u16* active,
                       u32 experts, u32 active_experts, u32 lag, u32 pool_rows, u32 two_sides, u32 side, const u32* tickets,
                       u32 count, u32* out) {
    const ExpertTable table{rows, bases, nullptr, active, experts, active_experts, two_sides};
    const Run run{lag, pool_rows, side};
    if (hidden == 128 && intermediate == 128) return walk<128, 128>(block_m, table, run, tickets, count, out);
    if (hidden == 256 && intermediate == 640) return walk<256, 640>(block_m, table, run, tickets, count, out);
    if (hidden == 1408 && intermediate == 768) return walk<1408, 768>(block_m, table, run, tickets, count, out);
    if (hidden == 2304 && intermediate == 1408) return walk<2304, 1408>(block_m, table, run, tickets, count, out);
    return false;
}
