// The hosts: each rank's program stages inputs, launches, waits for its own launch, checks what came out, and goes on.
#pragma once
#include <sys/time.h>
#include <csignal>

#include "engine.h"
#include "layout/shared.cuh"

namespace sim {

struct Launch {
    megamoe::Params params;
    u32 variant;   // its place in kVariants
};

struct SectionSize {
    std::string name;
    u64 offset, bytes;
};

struct Rank {
    Clock clock;
    u32 agent = 0, launch = 0, running = 0;   // launches begun; first block of the one that runs + 1
    u8 *symmetric = nullptr, *local = nullptr, *own = nullptr;
    u8 *raw_x = nullptr, *raw_ids = nullptr, *raw_weights = nullptr;   // inputs of a launch that stages them itself
    megamoe::u16* y = nullptr;
    i32* stats = nullptr;
    Launch now;
};

struct Run {
    u32 seed = 1, launches = 3, tokens = 8, pool_rows = 4096, rows = 0, most_pairs = 0;
    std::string variant = "mixed";
    std::vector<SectionSize> symmetric, local;
    std::vector<Rank> all;
    std::vector<std::vector<std::vector<i64>>> ids;   // [launch][rank][token * routed slots + slot]
    u64 pairs = 0, remote_pairs = 0;

    using C = variant0::Config;   // what all variants share

    static constexpr bool kRaw = C::kInputs == megamoe::Inputs::raw;
    static constexpr u32 kRouted = C::kTopK - C::kShared, kLocalRouted = C::kLocalExperts - C::kShared;   // as the router knows them
    static constexpr u32 kRoutedExperts = kLocalRouted * C::kRanks;
    static constexpr u64 kRawRow = C::kHidden * 2 + 32, kRawSlots = kRouted + 1;   // rows lie apart

    // ---- options
    static std::vector<SectionSize> sections_of(const std::string& text) {
        std::vector<SectionSize> sections;
        for (std::size_t at = 0; at < text.size();) {
            const std::size_t end = std::min(text.find(',', at), text.size());
            char name[64];
            SectionSize s;
            const std::string part = text.substr(at, end - at);
            if (std::sscanf(part.c_str(), "%63[^:]:%llu:%llu", name, &s.offset, &s.bytes) != 3) fail("bad section " + part);
            s.name = name, at = end + 1;
            sections.push_back(s);
        }
        return sections;
    }
    void option(const std::string& text) {
        const std::size_t at = text.find('=');
        const std::string key = text.substr(0, at), value = text.substr(at + 1);
        if (key == "symmetric") symmetric = sections_of(value);
        else if (key == "local") local = sections_of(value);
        else if (key == "variant") variant = value;
        else number(key, static_cast<u32>(std::stoul(value)));
    }
    void number(const std::string& key, u32 value) {
        if (key == "seed") seed = value;
        else if (key == "launches") launches = value;
        else if (key == "tokens") tokens = value;
        else if (key == "pool_rows") pool_rows = value;
        else if (key == "rows") rows = value;
        else if (key == "most_pairs") most_pairs = value;
        else if (key == "blocks") max_blocks = value;
        else if (key == "mutant") mutant = value;
        else fail("unknown option " + key);
    }

    // ---- the world
    static u64 end_of(const std::vector<SectionSize>& sections) {
        const u64 end = sections.back().offset + sections.back().bytes;
        return (end + Memory::kPage - 1) / Memory::kPage * Memory::kPage;
    }
    const SectionSize& section(const std::string& name) const {
        for (const auto* sections : {&symmetric, &local})
            for (const SectionSize& s : *sections)
                if (s.name == name) return s;
        fail("no section " + name);
    }
    void start() {
        std::signal(SIGVTALRM, [](int) { fail("no end in sight"); });
        const itimerval minute = {{0, 0}, {60, 0}};   // of its own time, however busy the machine is
        setitimer(ITIMER_VIRTUAL, &minute, nullptr);
        dice.state = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
        for (u32 i = 0; i < 8; ++i) dice.next();
        ranks = C::kRanks;
        sizes = {C::kHidden, C::kIntermediate, C::kLocalExperts, C::kTopK};
        Clock::agents = 2 * ranks * max_blocks * kBlockWarps + ranks;
        const u32 interrupts[] = {2, 10, 40, 70}, copying[] = {2, 30, 80};
        mood.interrupt = interrupts[dice.below(4)], mood.copy = copying[dice.below(3)], mood.stay = dice.below(2) * 80;
        if (dice.chance(30)) mood.rank = dice.below(ranks + 1) - 1;
        if (dice.chance(20)) mood.block = dice.below(max_blocks);
        if (dice.chance(30)) mood.warp = dice.below(kBlockWarps);
        const u64 own = (tokens * C::kHidden * 2 / 1024 + 1) * 1024, tables = weight_bytes() / 1024 * 1024 + 4096;
        const u64 each = end_of(symmetric) + end_of(local) + own + tables + 4096 + raw_bytes();
        memory.reserve(each * ranks);
        for (u32 r = 0; r < ranks; ++r) place_rank(r, each * r, own);
        for (u32 n = 0; n < launches; ++n) {
            ids.emplace_back();
            for (u32 r = 0; r < ranks; ++r) ids.back().push_back(route());
        }
    }
    u64 raw_bytes() const { return kRaw ? (tokens * (kRawRow + kRawSlots * 12) / 1024 + 4) * 1024 : 0; }
    void place_raw(Rank& rank, u32 r, u64 base) {
        const auto place = [&](const char* name, u64 bytes) {
            u8* at = memory.place(name, r, true, base, bytes).base;
            base += (bytes / 1024 + 1) * 1024;
            return at;
        };
        rank.raw_x = place("raw x", tokens * kRawRow);
        rank.raw_ids = place("raw ids", tokens * kRawSlots * 8);
        rank.raw_weights = place("raw weights", tokens * kRawSlots * 4);
    }
    static constexpr u32 kGroup = C::Weights::kGroup;   // columns that share an exponent; 0 for weights that have none
    static u64 weight_bytes() {
        const u64 codes = u64(C::kLocalExperts) * 3 * C::kIntermediate * C::kHidden;
        const u64 expanded = kGroup ? codes + codes / kGroup : 0;
        return 10 * 1024 + codes * C::Weights::kBits / 8 + codes / (128 * 128) * 4 + expanded + expanded_words() * 4;
    }
    /// Counters of variants that expand weights in memory.
    static u64 expanded_words() { return u64(C::kLocalExperts) * (2 * C::kIntermediate / 256 + (C::kHidden + 255) / 256); }
    void place_rank(u32 r, u64 base, u64 own) {
        all.emplace_back();
        Rank& rank = all.back();
        rank.agent = 2 * ranks * max_blocks * kBlockWarps + r;
        rank.clock.tick(rank.agent);
        for (const SectionSize& s : symmetric) memory.place(s.name, r, false, base + s.offset, s.bytes);
        rank.symmetric = memory.arena + base, base += end_of(symmetric);
        for (const SectionSize& s : local) memory.place(s.name, r, true, base + s.offset, s.bytes);
        rank.local = memory.arena + base, base += end_of(local);
        rank.y = reinterpret_cast<megamoe::u16*>(memory.place("y", r, true, base, tokens * C::kHidden * 2).base);
        base += own;
        rank.stats = reinterpret_cast<i32*>(memory.place("stats", r, true, base, C::kLocalExperts * 4).base);
        base += (C::kLocalExperts * 4 / 1024 + 1) * 1024;   // a shared expert has no counter, and must leave its place alone
        float* scales[2];
        u8 *codes[2], *exponents[2] = {};
        for (u32 gemm = 1; gemm <= 2; ++gemm) {
            const u32 wide = (gemm == 1 ? 2 * C::kIntermediate : C::kHidden) / 128;
            const u32 deep = (gemm == 1 ? C::kHidden : C::kIntermediate) / 128;
            const u64 bytes = u64(C::kLocalExperts) * wide * deep * 4;
            float* to = scales[gemm - 1] = reinterpret_cast<float*>(memory.place("weight scales", r, true, base, bytes).base);
            base += (bytes / 1024 + 1) * 1024;
            for (u32 e = 0; e < C::kLocalExperts; ++e)
                for (u32 row = 0; row < wide; ++row)
                    for (u32 k = 0; k < deep; ++k) *to++ = weight_scale(gemm, r * C::kLocalExperts + e, row, k);
            const u64 weights = u64(C::kLocalExperts) * wide * deep * 128 * 128, size = weights * C::Weights::kBits / 8;
            codes[gemm - 1] = memory.place("weights", r, true, base, size).base;
            base += (size / 1024 + 1) * 1024;
            if (kGroup == 0) {
                fill_weights(gemm, codes[gemm - 1]);
                continue;
            }
            exponents[gemm - 1] = memory.place("exponents", r, true, base, weights / (kGroup + !kGroup)).base;
            base += (weights / (kGroup + !kGroup) / 1024 + 1) * 1024;
            fill_packed(gemm, codes[gemm - 1], exponents[gemm - 1]);
        }
        megamoe::Params& p = rank.now.params;
        std::memset(static_cast<void*>(&p), 0, sizeof p);
        if (kGroup != 0) base = place_expanded(p, r, base);
        if (kRaw) place_raw(rank, r, base);
        p.packed1 = codes[0], p.packed2 = codes[1];
        p.weight1 = codes[0], p.weight2 = codes[1];
        p.weight1_exponents = exponents[0], p.weight2_exponents = exponents[1];
        p.weight1_scales = scales[0], p.weight2_scales = scales[1], p.y = rank.y, p.stats = rank.stats;
        fill(p, r);
    }
    static constexpr u64 kExpandedBytes[2] = {u64(C::kLocalExperts) * 2 * C::kIntermediate * C::kHidden,
                                              u64(C::kLocalExperts) * C::kIntermediate * C::kHidden};
    /// Where weights are expanded to.
    u64 place_expanded(megamoe::Params& p, u32 r, u64 base) {
        const auto place = [&](const char* name, u64 bytes) {
            u8* at = memory.place(name, r, true, base, bytes).base;
            base += (bytes / 1024 + 1) * 1024;
            return at;
        };
        p.expanded1 = place("expanded weights", kExpandedBytes[0]);
        p.expanded2 = place("expanded weights", kExpandedBytes[1]);
        p.expanded = reinterpret_cast<u32*>(place("expanded pieces", expanded_words() * 4));
        return base;
    }
    /// Those of the last launch must not pass for this one's.
    void poison_expanded(megamoe::Params& p, u32 r) {
        u8* const matrices[2] = {p.expanded1, p.expanded2};
        for (u32 i = 0; i < 2; ++i) {
            memory.write(matrices[i], kExpandedBytes[i], host(all[r], r));
            std::memset(matrices[i], 0xDD, kExpandedBytes[i]);
        }
        p.weight1 = +p.expanded1, p.weight2 = +p.expanded2;
    }
    void fill(megamoe::Params& p, u32 r) {
        u8* base = all[r].local;
#define AT(name) p.name = reinterpret_cast<decltype(+p.name)>(base + section(#name).offset)
        AT(act1_pool), AT(act1_scales), AT(act2_pool), AT(act2_scales), AT(row_pairs), AT(act1_ready), AT(act2_ready),
            AT(act2_done), AT(slice_counts), AT(control);
        if (ranks > 1) AT(row_places);
#undef AT
#define AT(name) p.name = section(#name).offset
        AT(x), AT(x_scales), AT(topk_ids), AT(topk_weights), AT(expert_offsets), AT(sorted_pairs), AT(signals), AT(combine);
#undef AT
        const u64 pool1 = reinterpret_cast<u64>(+p.act1_pool), pool2 = reinterpret_cast<u64>(+p.act2_pool);
        const u64 maps[4][5] = {{kAct1, pool1, pool_rows, C::kHidden, megamoe::kActBoxRows},
                                {kAct2, pool2, pool_rows, C::kIntermediate, megamoe::kActBoxRows},
                                {kAct1, pool1, pool_rows, C::kHidden, megamoe::kSmallBoxRows},
                                {kAct2, pool2, pool_rows, C::kIntermediate, megamoe::kSmallBoxRows}};
        megamoe::ptx::TensorMap* to[4] = {&p.act1, &p.act2, &p.act1_small, &p.act2_small};
        for (u32 i = 0; i < 4; ++i) std::memcpy(to[i]->opaque, maps[i], sizeof maps[i]);
        p.timeout_ns = 1, p.rank = r, p.pool_rows = pool_rows, p.clamp = 1e30f, p.shared_weight = kSharedWeight;
        p.counters = rows / megamoe::kCounterRows, p.most_pairs = most_pairs;
    }

    // ---- inputs
    /// Experts of a rank's tokens in one launch; -1 is a masked slot.
    std::vector<i64> route() const {
        const u32 kind = dice.below(5), count = dice.chance(15) ? 0 : dice.chance(50) ? tokens : dice.below(tokens + 1);
        std::vector<i64> out;
        const u32 hot = dice.below(kRoutedExperts);
        for (u32 i = 0; i < count * kRouted; ++i) {
            i64 e = dice.below(kRoutedExperts);
            if (kind == 1 && dice.chance(90)) e = hot;
            if (kind == 2) e = hot;
            if (kind == 3 && dice.chance(50)) e = dice.chance(50) ? -1 : kRoutedExperts + dice.below(2) * 7;
            if (kind == 4) e = i % kRoutedExperts;
            out.push_back(e);
        }
        return out;
    }
    static bool real(i64 e) { return e >= 0 && e < kRoutedExperts; }
    /// Where the weights of a slot's expert lie, counted through all ranks; `id` is the router's, if it has filled the slot.
    static u32 expert_of(u32 r, u32 slot, i64 id) {
        if (slot >= kRouted) return r * C::kLocalExperts + kLocalRouted + slot - kRouted;
        const u32 e = static_cast<u32>(id);
        return e / kLocalRouted * C::kLocalExperts + e % kLocalRouted;
    }
    Actor host(Rank& rank, u32 r) { return {&rank.clock, {rank.agent, rank.clock.now(rank.agent)}, false, r}; }
    void* stage(u32 r, const std::string& name, u64 offset, u64 bytes) {
        u8* to = all[r].symmetric + section(name).offset + offset;
        if (bytes) memory.write(to, bytes, host(all[r], r));
        return to;
    }
    /// Values of the last launch must not pass for this one's.
    void poison(u32 r, const std::string& name) {
        const SectionSize& s = section(name);
        const bool remote = &s >= symmetric.data() && &s < symmetric.data() + symmetric.size();
        u8* to = (remote ? all[r].symmetric : all[r].local) + s.offset;
        memory.write(to, s.bytes, host(all[r], r));
        std::memset(to, 0xDD, s.bytes);
        Section& shadow = memory.find(to, s.bytes, "poison");
        for (u64 i = 0; i < s.bytes / shadow.cell_bytes; ++i) shadow.cells[i].writes = 0;
    }
    void begin(u32 r) {
        Rank& rank = all[r];
        const u32 n = rank.launch++;
        const auto& chosen = ids[n][r];
        const u32 count = static_cast<u32>(chosen.size()) / kRouted, blocks_per_row = C::kHidden / 128;
        if (kRaw) give_raw(n, r, count);
        for (u32 t = 0; t < count && !kRaw; ++t) {
            fill_x(n, r, t, static_cast<u8*>(stage(r, "x", u64(t) * C::kHidden, C::kHidden)));
            float* scales = static_cast<float*>(stage(r, "x_scales", t * blocks_per_row * 4, blocks_per_row * 4));
            for (u32 b = 0; b < blocks_per_row; ++b) scales[b] = x_scale(n, r, t, b);
        }
        const u32 slots = kRaw ? 0 : count * kRouted;
        if (slots) std::memcpy(stage(r, "topk_ids", 0, slots * 8), chosen.data(), slots * 8);
        float* weights = static_cast<float*>(stage(r, "topk_weights", 0, slots * 4));
        for (u32 i = 0; i < slots; ++i) weights[i] = slot_weight(n, i);
        for (const char* name : {"combine", "sorted_pairs", "expert_offsets"})
            if (ranks == 1 || name[0] == 'c') poison(r, name);   // other ranks may have stored their lists of this launch
        for (const char* name : {"slice_counts", "row_pairs", "act1_scales", "act2_scales"}) poison(r, name);
        if (count) {
            memory.write(rank.y, count * C::kHidden * 2, host(rank, r));
            std::memset(rank.y, 0xDD, count * C::kHidden * 2);
        }
        memory.write(rank.stats, C::kLocalExperts * 4, host(rank, r));
        std::memset(rank.stats, 0, C::kLocalExperts * 4);
        launch(r, count);
    }
    /// The inputs as a caller has them, ids of 32 or of 64 bits; the buffer holds what must not pass for them.
    void give_raw(u32 n, u32 r, u32 count) {
        Rank& rank = all[r];
        megamoe::Params& p = rank.now.params;
        for (const char* name : {"x", "x_scales", "topk_ids", "topk_weights"}) poison(r, name);
        const bool wide = dice.chance(50);
        memory.write(rank.raw_x, tokens * kRawRow, host(rank, r));
        for (u32 t = 0; t < count; ++t) {
            fill_raw_x(n, r, t, rank.raw_x + t * kRawRow);
            for (u32 k = 0; k < kRouted; ++k) {
                const u64 at = t * kRawSlots + k;
                const i64 id = ids[n][r][t * kRouted + k];
                const float weight = slot_weight(n, t * kRouted + k) / 2;
                std::memcpy(rank.raw_ids + at * (wide ? 8 : 4), &id, wide ? 8 : 4);
                std::memcpy(rank.raw_weights + at * 4, &weight, 4);
            }
        }
        p.raw_x = rank.raw_x, p.raw_ids = rank.raw_ids, p.raw_weights = rank.raw_weights, p.raw_x_stride = kRawRow;
        p.raw_ids_stride = p.raw_weights_stride = kRawSlots, p.raw_formats = wide, p.weight_factor = 2;
    }
    static float slot_weight(u32 n, u32 slot) { return 1 + (n + slot) % 3; }
    static constexpr u32 kSharedWeight = 2;

    void launch(u32 r, u32 count) {
        Rank& rank = all[r];
        megamoe::Params& p = rank.now.params;
        const u32 grid = dice.chance(60) ? max_blocks : 1 + dice.below(max_blocks), lags[] = {0, 3, 2 * grid, 1000};
        p.tokens = count, p.sort_blocks = 1 + dice.below(grid);
        p.item_shift = dice.chance(50) ? 0 : 3, p.lag_tiles = lags[dice.below(4)];
        p.want_sides = grid > 1 && dice.chance(50);
        p.side_of_sm[0] = dice.below(4) ? dice.below(1u << 16) : 0;   // any, or all on one side
        for (u32 s = 0; s < ranks; ++s) p.peers[s] = reinterpret_cast<u64>(all[s].symmetric);
        rank.now.variant = variant == "mixed" ? dice.below(static_cast<u32>(kVariants.size())) : named(variant);
        p.weight1 = p.packed1, p.weight2 = p.packed2, p.expand_every = 1 + dice.below(4);
        if (with_config(rank.now.variant, [](auto c) { return decltype(c)::Policy::kExpands; })) poison_expanded(p, r);
        rank.running = static_cast<u32>(blocks.size()) + 1;
        rank.clock.fence();   // what went before is visible to the whole launch
        for (u32 b = 0; b < grid; ++b) blocks.push_back(make_block(rank, r, b, grid));
        rank.clock.tick(rank.agent);
    }
    static u32 named(const std::string& name) {
        const auto found = std::find(kVariants.begin(), kVariants.end(), name);
        return static_cast<u32>(found - kVariants.begin());
    }
    std::unique_ptr<Block> make_block(Rank& rank, u32 r, u32 index, u32 grid) {
        auto block = std::make_unique<Block>();
        block->rank = r, block->index = index, block->grid = grid, block->launch = &rank.now;
        block->shared_bytes = with_config(rank.now.variant, [](auto c) { return u32(megamoe::Shared<decltype(c)>::kBytes); });
        block->memory.reset(new u8[block->shared_bytes + 1024]);
        block->stored.assign(block->shared_bytes / 16, {});
        const u64 address = reinterpret_cast<u64>(block->memory.get());
        block->shared = block->memory.get() + (1024 - address % 1024) % 1024;
        std::memset(block->shared, 0xDD, block->shared_bytes);
        block->threads = block->live = with_config(rank.now.variant, [](auto c) { return megamoe::kBlockThreads<decltype(c)>; });
        for (u32 w = 0; w < kBlockWarps; ++w) {
            Warp& warp = block->warps[w];
            warp.block = block.get(), warp.index = w, warp.agent = 2 * ((r * max_blocks + index) * kBlockWarps + w);
            warp.clock = rank.clock;
            warp.copies = warp.clock.now(warp.copy_agent());
            warp.clock.tick(warp.agent);
            if (w >= block->threads / kLanes) continue;   // of other variants
            warp.live = ~0u;
            for (u32 l = 0; l < kLanes; ++l) {
                warp.lanes[l].warp = &warp, warp.lanes[l].index = l;
                make_ready(warp.lanes[l]);
            }
        }
        return block;
    }

    // ---- results
    bool finished(const Rank& rank) const {
        const u32 first = rank.running - 1;
        for (u32 b = 0; b < blocks[first]->grid; ++b)
            if (blocks[first + b]->live != 0) return false;
        return true;
    }
    void end(u32 r) {
        Rank& rank = all[r];
        for (u32 b = rank.running - 1, left = blocks[b]->grid; left > 0; --left, ++b) {
            Block& block = *blocks[b];
            if (block.copies != 0) fail("a block of rank " + std::to_string(r) + " ended with copies in flight");
            for (Warp& warp : block.warps) {
                rank.clock.join(warp.clock);
                rank.clock.learn({warp.copy_agent(), warp.copies});
                for (Lane& lane : warp.lanes)
                    if (lane.started) give_stack(lane.stack);
            }
            block.memory.reset();
        }
        rank.running = 0;
        check(r, rank.launch - 1);
    }
    void check(u32 r, u32 n) {
        const auto& chosen = ids[n][r];
        const std::string where = " of rank " + std::to_string(r) + " in launch " + std::to_string(n);
        std::vector<u8> row(C::kHidden);
        const Section& slots = memory.find(all[r].symmetric + section("combine").offset, 1, "check");
        for (u32 t = 0; t < chosen.size() / kRouted; ++t) {
            fill_x(n, r, t, row.data());
            std::vector<u32> sums(C::kHidden / 64);
            for (u32 k = 0; k < C::kTopK; ++k) {
                const bool shared = k >= kRouted;
                const u32 given = t * kRouted + k;   // where the router's id and weight are, if it has any
                const i64 id = shared ? 0 : chosen[given];
                check_slot(slots, t * C::kTopK + k, real(id), where);
                if (!real(id)) continue;
                const auto values = expected_slot(row.data(), expert_of(r, k, id));
                const u32 weight = shared ? kSharedWeight : static_cast<u32>(slot_weight(n, given));
                for (u32 g = 0; g < sums.size(); ++g) sums[g] += values[g] * weight;
                ++pairs, remote_pairs += expert_of(r, k, id) / C::kLocalExperts != r;
            }
            memory.read(all[r].y + u64(t) * C::kHidden, C::kHidden * 2, host(all[r], r));
            for (u32 c = 0; c < C::kHidden; ++c)
                if (all[r].y[u64(t) * C::kHidden + c] != sums[c / 64])
                    fail("wrong result: token " + std::to_string(t) + " column " + std::to_string(c) + where + ": " +
                         std::to_string(all[r].y[u64(t) * C::kHidden + c]) + " instead of " + std::to_string(sums[c / 64]));
        }
        for (u32 e = 0; e < C::kLocalExperts; ++e) {
            i32 count = 0;
            for (const auto& from : ids[n])
                for (const i64 id : from) count += e < kLocalRouted && id == i64(r * kLocalRouted + e);
            if (all[r].stats[e] != count) fail("wrong count of rows of local expert " + std::to_string(e) + where);
        }
    }
    static void check_slot(const Section& slots, u32 slot, bool used, const std::string& where) {
        for (u64 b = 0; b < C::kHidden * 2; b += 16) {
            const u32 writes = slots.cells[(u64(slot) * C::kHidden * 2 + b) / 16].writes;
            if (writes != used) fail("slot " + std::to_string(slot) + where + " was written " + std::to_string(writes) + " times");
        }
    }
    /// Lets the hosts act whose turn it is.
    bool hosts() {
        bool did = false, open = false;
        for (u32 r = 0; r < ranks; ++r) {
            Rank& rank = all[r];
            const bool late = static_cast<i32>(r) == mood.rank && dice.chance(90);
            open |= rank.running || rank.launch < launches;
            if (late) continue;
            if (rank.running && finished(rank)) end(r), did = true;
            else if (!rank.running && rank.launch < launches) begin(r), did = true;
        }
        if (did || !open || !ready_warps.empty() || !copies.empty()) return did;
        if (mood.rank >= 0) return mood.rank = -1, true;   // it was only late
        report_deadlock();
    }
    void finish() {
        const Traffic& t = traffic;
        std::printf("pairs=%llu remote_pairs=%llu small_loads=%llu loads=%llu loaded_bytes=%llu small_stores=%llu stores=%llu ",
                    pairs, remote_pairs, t.small_loads, t.loads, t.loaded_bytes, t.small_stores, t.stores);
        std::printf("signals=%llu signals_of_a_lane=%llu copies_in_flight=%llu\n", t.signals, t.signals_of_a_lane,
                    t.copies_in_flight);
    }
};

}  // namespace sim
