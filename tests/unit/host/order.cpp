// The tile order of the kernels as a shared library for tests/unit/kernels/test_order.py.
#include "sched/order.cuh"

namespace {

using megamoe::Plan;
using megamoe::Tile;
using megamoe::u16;
using megamoe::u32;
using megamoe::Variant;

/// What a kernel's entry defines (kernels/*.cuh.j2).
template <Variant kVariant_, u32 kHidden_, u32 kIntermediate_> struct Config {
    static constexpr Variant kVariant = kVariant_;
    static constexpr u32 kBlockM = kVariant == Variant::pingpong ? 64 : 128;
    static constexpr u32 kHidden = kHidden_, kIntermediate = kIntermediate_;
    static constexpr u32 kExperts = 16, kRanks = 1, kLocalExperts = 16, kTopK = 2;
    static constexpr u32 kStages = 4, kDispatchSlots = 4;
    static constexpr bool kFastMath = true;
};

struct Run {
    u32 lag, pool_rows, side;
};

/// One walker per call, like one block of threads per launch; seven words per ticket.
template <class C> void walk(const Plan& plan, const Run& run, const u32* tickets, u32 count, u32* out) {
    megamoe::TileOrder<C> order(plan, run.lag, run.pool_rows, run.side);
    for (u32 i = 0; i < count; ++i) {
        const Tile tile = order.locate(tickets[i]);
        const u32 words[7] = {tile.kind, tile.expert, tile.n, tile.row, tile.rows, tile.k_blocks, tile.pool_row};
        for (u32 w = 0; w < 7; ++w) out[7 * i + w] = words[w];
    }
}

template <u32 kHidden, u32 kIntermediate>
void walk(bool pingpong, const Plan& plan, const Run& run, const u32* tickets, u32 count, u32* out) {
    if (pingpong) walk<Config<Variant::pingpong, kHidden, kIntermediate>>(plan, run, tickets, count, out);
    else walk<Config<Variant::cooperative, kHidden, kIntermediate>>(plan, run, tickets, count, out);
}

}  // namespace

extern "C" u32 even_enough(u32 blocks0, u32 blocks1) { return megamoe::even_enough(blocks0, blocks1); }

/// False when these sizes are not built in.
extern "C" bool locate(u32 hidden, u32 intermediate, bool pingpong, const u32* rows, const u32* bases, const u16* active,
                       u32 experts, u32 active_experts, u32 lag, u32 pool_rows, u32 two_sides, u32 side, const u32* tickets,
                       u32 count, u32* out) {
    const Plan plan{rows, bases, nullptr, active, experts, active_experts, two_sides};
    const Run run{lag, pool_rows, side};
    if (hidden == 128 && intermediate == 128) walk<128, 128>(pingpong, plan, run, tickets, count, out);
    else if (hidden == 256 && intermediate == 640) walk<256, 640>(pingpong, plan, run, tickets, count, out);
    else if (hidden == 1408 && intermediate == 768) walk<1408, 768>(pingpong, plan, run, tickets, count, out);
    else if (hidden == 2304 && intermediate == 1408) walk<2304, 1408>(pingpong, plan, run, tickets, count, out);
    else return false;
    return true;
}
