// Blocks with their shared memory and barriers, and copies that finish whenever the dice say so.
#pragma once
#include <functional>

#include "memory.h"

namespace sim {

/// An mbarrier: arrivals and bytes of the current phase.
struct PhaseBarrier {
    u32 arrivals = 0, pending = 0, phase = 0;
    i64 bytes = 0;
    Clock gathering, published;
    u32 learned[kBlockWarps] = {};
    std::vector<Lane*> waiting;
};

/// Who stored weights to sixteen bytes of shared memory last, and how many proxy fences it had had by then.
struct Stored {
    const Lane* by = nullptr;
    u32 fences = 0;
};

struct Block {
    u32 rank = 0, index = 0, grid = 0;
    std::unique_ptr<u8[]> memory;   // shared; 1024 more than there is, for alignment
    u8* shared = nullptr;
    u32 shared_bytes = 0;
    std::vector<Stored> stored;   // by address / 16
    Warp warps[kBlockWarps];
    NamedBarrier barriers[16];
    std::unordered_map<u32, PhaseBarrier> phases;   // mbarriers by address
    u32 threads = 0, live = 0;                      // all; those that have not ended
    u32 copies = 0;                                 // in flight
    const void* launch = nullptr;

    u8* at(u32 address, u32 bytes, u32 align) {
        if (address + bytes > shared_bytes || address % align) fail("bad shared address in " + name_of(now));
        return shared + address;
    }
    void note_weights(u32 address) { stored[address / 16] = {now, now->fences}; }
    /// The async proxy is to read these bytes: a bulk store or a matrix product.
    void need_fence(u32 address, u32 bytes) const {
        for (u32 i = address / 16; i < (address + bytes + 15) / 16; ++i)
            if (stored[i].by && stored[i].by->fences == stored[i].fences)
                fail("weights in shared memory without a proxy fence since the store of " + name_of(stored[i].by));
    }
    PhaseBarrier& phase(u32 address) {
        const auto found = phases.find(address);
        if (found == phases.end()) fail("no barrier has been initialised there, in " + name_of(now));
        return found->second;
    }
};

/// A copy that its thread waits for; `state` 0: issued, 1: its source has been read, 2: written.
struct Store {
    u32 state = 0, group = 0, number = 0;   // `number`: among its warp's copies
    Lane* waiting = nullptr;
};

/// Something asynchronous: `step` is called at a random moment, again if it says that it is not done.
struct Copy {
    Block* block;
    std::function<bool()> step;
};
inline std::vector<Copy> copies;
inline bool expired = false;   // every deadline has passed: nobody can go on, and all shall say what they wait for

/// Deliberate mistakes of the test: instructions that do less than they should.
enum Weak : u32 {
    kNothing = 0,   // 1 to 99: waits that are left out, by their code in comm/fault.cuh
    kNoProxyFence = 101,
    kAddRelaxed = 102,
    kLoadRelaxed = 103,
    kSystemStoreRelaxed = 104,
    kSystemLoadRelaxed = 105,
    kBarrierAddRelaxed = 106,
    kNoWaitForStores = 107,
    kNoWaitForStoresRead = 108,
    kNoExpectedBytes = 109,
    kNoWarpBarrier = 110,
    kNoWaitForProducts = 111,
    kNoWaitForThreadLoads = 112,
    kLookSaysYes = 113,
    kMeetingAddAcquires = 114,   // and does not release
    kMeetingAddReleases = 115,
    kNoDeviceFence = 116,
};
inline u32 mutant = kNothing;

// ---- who acts
inline Actor actor() {
    Warp& w = *now->warp;
    ++w.version;   // what it does now is not in what it has released
    return {&w.clock, {w.agent, w.clock.now(w.agent)}, false, w.block->rank};
}
/// The next copy that this warp starts.
inline Actor copy_actor() {
    Warp& w = *now->warp;
    return {&w.clock, {w.copy_agent(), w.copies + 1}, true, w.block->rank};
}

// ---- mbarriers
inline void complete_if_due(PhaseBarrier& bar) {
    if (bar.pending != 0 || bar.bytes != 0) return;
    bar.pending = bar.arrivals, ++bar.phase;
    bar.published.join(bar.gathering);
    wake(bar.waiting);
}
inline void phase_init(u32 address, u32 arrivals) {
    PhaseBarrier& bar = now->warp->block->phases[address];
    if (bar.arrivals != 0) fail("a barrier is initialised twice");
    bar.arrivals = bar.pending = arrivals;
}
inline void phase_arrive(u32 address) {
    maybe_leave();
    PhaseBarrier& bar = now->warp->block->phase(address);
    now->warp->release_to(bar.gathering);
    --bar.pending;
    complete_if_due(bar);
}
inline void phase_expect(u32 address, u32 bytes) {
    if (mutant != kNoExpectedBytes) now->warp->block->phase(address).bytes += bytes;
}
/// Whether the phase of this parity is complete; who learns it sees what its arrivals have published.
inline bool phase_complete(PhaseBarrier& bar, u32 parity) {
    if ((bar.phase & 1) == parity) return false;
    if (bar.learned[now->warp->index] != bar.phase) {
        bar.learned[now->warp->index] = bar.phase;
        now->warp->acquire(bar.published);
    }
    return true;
}
inline bool phase_wait(u32 address, u32 parity) {
    PhaseBarrier& bar = now->warp->block->phase(address);
    now->polled.clear();
    maybe_leave();
    if (phase_complete(bar, parity)) return true;
    if (expired) {
        if (++now->tries > 100) sleep("a barrier at shared address", address);
        return false;
    }
    bar.waiting.push_back(now);
    sleep("a barrier at shared address", address);
    return false;
}
inline bool phase_look(u32 address, u32 parity) {
    maybe_leave();
    return mutant == kLookSaysYes || phase_complete(now->warp->block->phase(address), parity);
}

// ---- named barriers
inline void named_arrive(u32 id, u32 threads, bool wait) {
    maybe_leave();
    NamedBarrier& bar = now->warp->block->barriers[id];
    Warp& warp = *now->warp;
    if (bar.arrived == 0) bar.expected = threads;
    if (bar.expected != threads) fail("a named barrier is used with two counts, in " + name_of(now));
    if (bar.joined[warp.index] != warp.version) {
        warp.release_to(bar.gathering);
        bar.joined[warp.index] = warp.version;
    }
    const u32 generation = bar.generation;
    if (++bar.arrived == threads) {
        bar.arrived = 0, ++bar.generation;
        bar.published.join(bar.gathering);
        wake(bar.waiting);
    } else if (wait) {
        while (bar.generation == generation) {
            bar.waiting.push_back(now);
            sleep("a named barrier", id);
        }
    }
    if (wait && bar.learned[warp.index] != generation + 1) {
        bar.learned[warp.index] = generation + 1;
        warp.acquire(bar.published);
    }
}

// ---- words that others wait for
inline void changed(Memory::Word& word) {
    ++word.version;
    wake(word.waiting);
}
inline u32 word_load(const u32* p, bool system) {
    maybe_leave();
    Memory::Word& word = memory.word(p, system, actor());
    if (mutant != (system ? kSystemLoadRelaxed : kLoadRelaxed)) now->warp->acquire(word.clock);
    if (now->polled.size() > 16) now->polled.clear();
    now->polled.emplace_back(p, word.version);
    return *p;
}
inline u32 word_add(u32* p, u32 value, bool release, bool acquire = false) {
    maybe_leave();
    Memory::Word& word = memory.word(p, false, actor());
    if (acquire) now->warp->acquire(word.clock);
    if (release) now->warp->release_to(word.clock);
    const u32 old = *p;
    *p = old + value;
    changed(word);
    return old;
}
/// Relaxed; others learn what the warp had fenced before.
template <class New> void word_change_relaxed(u32* p, New changes) {
    maybe_leave();
    Memory::Word& word = memory.word(p, false, actor());
    word.clock.join(now->warp->fenced);
    *p = changes(*p);
    changed(word);
}
inline void word_store(u32* p, u32 value) {
    maybe_leave();
    Memory::Word& word = memory.word(p, true, actor());
    if (static_cast<i32>(value - *p) <= 0) fail("a signal goes from " + std::to_string(*p) + " to " + std::to_string(value));
    if (mutant != kSystemStoreRelaxed) now->warp->release_to(word.clock);
    if (memory.find(p, 4, "signal").rank != now->warp->block->rank) ++traffic.signals;
    traffic.signals_of_a_lane = std::max<u64>(traffic.signals_of_a_lane, ++now->signals);
    *p = value;
    changed(word);
}
/// The nanosecond timer, read only in loops that wait: sleeps until one of the words that were read changes.
inline u64 timer() {
    static u64 late = 0;
    if (expired) return late += u64(1) << 32;
    bool still = !now->polled.empty();
    for (const auto& [p, version] : now->polled) still = still && memory.words[p].version == version;
    if (still) {
        for (const auto& [p, version] : now->polled) memory.words[p].waiting.push_back(now);
        sleep("a word in global memory", reinterpret_cast<u64>(now->polled[0].first));
    }
    now->polled.clear();
    return expired ? late += u64(1) << 32 : 0;
}

// ---- copies
inline void start_copy(std::function<bool()> step) {
    Block* block = now->warp->block;
    ++now->warp->copies, ++block->copies;
    copies.push_back({block, std::move(step)});
}
/// Something that lands in shared memory and counts its bytes at a barrier.
inline void start_load(u32 barrier, u32 bytes, std::function<void()> land) {
    Block* block = now->warp->block;
    PhaseBarrier& bar = block->phase(barrier);
    // Whoever sees the phase complete knows this copy and what its issuer knew.  It cannot complete before.
    bar.gathering.join(now->warp->clock);
    bar.gathering.learn({now->warp->copy_agent(), now->warp->copies + 1});
    start_copy([&bar, bytes, land = std::move(land)] {
        land();
        if (mutant != kNoExpectedBytes) bar.bytes -= bytes;
        complete_if_due(bar);
        return true;
    });
}
inline void start_store(u8* to, u32 from, u32 bytes) {
    Block* block = now->warp->block;
    const u8* source = block->at(from, bytes, 16);
    block->need_fence(from, bytes);
    auto store = std::make_shared<Store>();
    store->number = now->warp->copies + 1;
    now->stores.push_back(store);
    start_copy([=, held = std::vector<u8>()]() mutable {
        if (++store->state == 1) held.assign(source, source + bytes);
        else std::memcpy(to, held.data(), bytes);
        if (store->waiting) make_ready(*store->waiting), store->waiting = nullptr;
        return store->state == 2;
    });
}
/// Until all bulk stores of this thread but the last `pending` have come to `state`.
inline void wait_stores(u32 pending, u32 state) {
    maybe_leave();
    auto& stores = now->stores;
    for (std::size_t i = 0; i + pending < stores.size(); ++i)
        while (stores[i]->state < state) {
            stores[i]->waiting = now;
            sleep("a bulk store", i);
        }
    if (state < 2) return;
    if (pending == 0) now->warp->clock.learn({now->warp->copy_agent(), now->warp->copies}), ++now->warp->version;
    if (stores.size() <= pending) return;
    const u32 last = stores[stores.size() - pending - 1]->number;   // that is complete
    now->warp->clock.learn({now->warp->copy_agent(), last}), ++now->warp->version;
    stores.erase(stores.begin(), stores.end() - pending);
}
/// 16 bytes to shared memory that only this thread waits for.
inline void start_thread_load(u32 to, const void* from) {
    u8* target = now->warp->block->at(to, 16, 16);
    memory.read(from, 16, actor());
    auto load = std::make_shared<Store>();
    load->group = now->load_groups;
    now->loads.push_back(load);
    start_copy([=] {
        std::memcpy(target, from, 16);
        load->state = 2;
        if (load->waiting) make_ready(*load->waiting), load->waiting = nullptr;
        return true;
    });
}
inline void wait_thread_loads(u32 pending) {
    maybe_leave();
    auto& loads = now->loads;
    std::size_t due = 0;
    for (; due < loads.size() && loads[due]->group + pending < now->load_groups; ++due)
        while (loads[due]->state < 2) {
            loads[due]->waiting = now;
            sleep("a copy", due);
        }
    loads.erase(loads.begin(), loads.begin() + due);
}
/// Lets one copy go one step further.
inline void run_copy(u32 which) {
    std::swap(copies[which], copies.back());
    Copy copy = std::move(copies.back());
    copies.pop_back();
    if (copy.step()) --copy.block->copies;
    else copies.push_back(std::move(copy));
}

}  // namespace sim
