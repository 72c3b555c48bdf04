// What the parts leave open: names, failures, stacks, the end of a thread, and the loop that runs everything.
#pragma once
#include <sys/mman.h>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "packed.h"

namespace sim {

inline u32 max_blocks = 1;
inline std::vector<std::unique_ptr<Block>> blocks;   // of all launches; the old ones are empty
inline std::string story;                            // of the run, for failures

inline std::string name_of(Stamp s) {
    const u32 warp = s.agent / 2, all = ranks * max_blocks * kBlockWarps;
    if (warp >= all) return "the host of rank " + std::to_string(s.agent - 2 * all);
    const u32 block = warp / kBlockWarps;
    return std::string(s.agent % 2 ? "a copy of " : "") + "rank " + std::to_string(block / max_blocks) + " block " +
           std::to_string(block % max_blocks) + " warp " + std::to_string(warp % kBlockWarps);
}
inline std::string name_of(const Lane* lane) {
    if (lane == nullptr) return "a host";
    return name_of(Stamp{lane->warp->agent, 0}) + " lane " + std::to_string(lane->index);
}
inline void fail(const std::string& what) {
    std::printf("%s\n%s", what.c_str(), story.c_str());
    std::fflush(stdout);
    std::_Exit(1);
}
inline void Memory::race(const Section& s, u64 cell, const char* does, Stamp by, const char* how, Stamp other) const {
    fail("race: " + name_of(by) + " " + does + " " + s.name + " of rank " + std::to_string(s.rank) + " at byte " +
         std::to_string(cell * s.cell_bytes) + " " + how + " " + name_of(other));
}

inline void* map_pages(u64 bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory");
    return p;
}
inline void Memory::reserve(u64 size) {
    bytes = size, arena = static_cast<u8*>(map_pages(size)), pages.resize(size / kPage);
}
inline Section& Memory::place(const std::string& name, u32 rank, bool local, u64 offset, u64 size) {
    Section s;
    s.name = name, s.rank = rank, s.local = local, s.base = arena + offset, s.bytes = size;
    const bool wide = name == "x" || name == "combine" || name == "act1_pool" || name == "act2_pool" ||
                      name == "expanded weights";
    const bool given = name == "weights" || name == "exponents";   // by the caller: no launch writes them
    s.cell_bytes = given ? 128 : wide ? 16 : name == "y" ? 8 : 4;
    s.cells = static_cast<Cell*>(map_pages((size / s.cell_bytes + 1) * sizeof(Cell)));
    sections.push_back(s);
    for (u64 page = offset / kPage; page * kPage < offset + size; ++page) {
        if (pages[page] != 0) fail(name + " overlaps " + sections[pages[page] - 1].name);
        pages[page] = static_cast<u16>(sections.size());
    }
    return sections.back();
}

inline std::vector<void*> free_stacks;
inline void* take_stack() {
    if (free_stacks.empty()) {
        u8* many = static_cast<u8*>(map_pages(256 * kStackBytes));
        for (u32 i = 0; i < 256; ++i) free_stacks.push_back(many + i * kStackBytes);
    }
    void* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
}
inline void give_stack(void* stack) { free_stacks.push_back(stack); }

/// The kernel, for a thread of this block; defined where the kernels are compiled.
void run_kernel(Block& block);

inline void thread_main() {
    run_kernel(*now->warp->block);
    Warp& warp = *now->warp;
    if (!now->products.empty()) fail("matrix products in flight at the end of " + name_of(now));
    for (const auto& store : now->stores)
        if (store->state != 2) fail("bulk stores in flight at the end of " + name_of(now));
    warp.live &= ~(1u << now->index), warp.ready &= ~(1u << now->index);
    if (warp.arrived != 0 && warp.arrived == warp.live) {   // the others were waiting for this lane
        warp.arrived = 0, ++warp.generation;
        for (u32 l = 0; l < kLanes; ++l)
            if (warp.live >> l & 1) make_ready(warp.lanes[l]);
    }
    --warp.block->live;
    leave();
}

/// Nobody can go on: lets every deadline pass, so that all say what they wait for.
[[noreturn]] inline void report_deadlock() {
    expired = true;
    for (const auto& block : blocks)
        for (Warp& warp : block->warps)
            for (Lane& lane : warp.lanes)
                if (warp.live >> lane.index & 1 && lane.waits && lane.waits[0] == 'a') make_ready(lane);
    while (!ready_warps.empty()) {
        Warp* warp = ready_warps.back();
        ready_warps.pop_back();
        warp->queued = false;
        run_warp(*warp);
        if (warp->ready != 0 && !warp->queued) warp->queued = true, ready_warps.push_back(warp);
    }
    std::set<std::string> stuck;
    for (const auto& block : blocks)
        for (Warp& warp : block->warps)
            for (Lane& lane : warp.lanes)
                if (warp.live >> lane.index & 1 && lane.waits && lane.waits[0] == 'a')
                    stuck.insert(name_of(Stamp{warp.agent, 0}) + " waits for " + lane.waits + " " + std::to_string(lane.detail));
    for (const std::string& line : stuck) story += line + "\n";
    fail("deadlock");
}

/// Runs everything to its end; `hosts` lets the hosts act, and says whether one did.
template <class Hosts> void run_all(Hosts&& hosts) {
    const auto starved = [](const Warp& w) {
        return static_cast<i32>(w.block->rank) == mood.rank || static_cast<i32>(w.block->index) == mood.block ||
               static_cast<i32>(w.index) == mood.warp;
    };
    while (true) {
        if (dice.chance(1) || (ready_warps.empty() && copies.empty())) {
            now = nullptr;
            const bool did = hosts();
            if (!did && ready_warps.empty() && copies.empty()) return;
        }
        if (!copies.empty() && (ready_warps.empty() || dice.chance(mood.copy))) {
            run_copy(dice.below(static_cast<u32>(copies.size())));
            continue;
        }
        if (ready_warps.empty()) continue;
        u32 pick = dice.below(static_cast<u32>(ready_warps.size()));
        for (u32 again = 0; again < 20 && starved(*ready_warps[pick]); ++again)
            pick = dice.below(static_cast<u32>(ready_warps.size()));
        std::swap(ready_warps[pick], ready_warps.back());
        Warp* warp = ready_warps.back();
        ready_warps.pop_back();
        warp->queued = false;
        do run_warp(*warp);
        while (warp->ready != 0 && dice.chance(mood.stay));
        if (warp->ready != 0 && !warp->queued) warp->queued = true, ready_warps.push_back(warp);
    }
}

}  // namespace sim
