// Virtual threads: one fiber per CUDA thread, in warps and blocks, and the dice that choose who goes on.
//
// A lane runs until it has to wait, or until the dice interrupt it at an access that others can see.  Warps are chosen
// by chance; a run may starve a rank, a block or a role, so that rare orders become common.
#pragma once
#include <array>
#include <csetjmp>
#include <ucontext.h>
#include <memory>
#include <string>

#include "clocks.h"

namespace sim {

constexpr u32 kLanes = 32, kBlockWarps = BLOCK_WARPS;   // most of a block, of all variants

struct Block;
struct Warp;
struct Store;

/// Where a step's weights come from: the first of 64 rows, those of all experts of a rank counted, and of 32 columns.
struct WeightTag {
    u32 tensor, row, column, unused;
};

/// A thread.
struct Lane {
    Warp* warp = nullptr;
    u32 index = 0;   // in its warp
    jmp_buf context;
    void* stack = nullptr;
    bool started = false;
    const char* waits = nullptr;   // what for, when it does
    u64 detail = 0;
    u32 tries = 0;                                      // of a barrier, after the deadline
    std::vector<std::pair<const void*, u32>> polled;    // words read while it waits, and their versions
    std::vector<std::shared_ptr<Store>> stores;         // bulk stores in flight, oldest first
    std::vector<std::shared_ptr<Store>> loads;          // its own copies to shared memory, oldest first
    u32 load_groups = 0;                                // of them, committed so far
    /// Two rows of activations, 32 deep, as they were when they came into registers.
    using Rows = std::array<u8, 64>;
    /// `tag`, `rows`: of weights, of activations that came through registers (sim/model.h); null for an operand in shared memory.
    /// `unpacked`: weights there are e5m2 codes that were once packed.
    struct Product {
        float* to;
        u32 count;
        u64 a, b;
        u32 accumulate, group;
        bool swapped = false;
        std::shared_ptr<WeightTag> tag = nullptr;
        bool unpacked = false;
        std::shared_ptr<Rows> rows = nullptr;
    };
    std::shared_ptr<Rows> rows[16];   // those read last
    u32 rows_read = 0;
    std::vector<Product> products;   // matrix products in flight
    u32 groups = 0;                  // of them, committed so far
    u32 signals = 0;                 // stored for other ranks and its own
    u32 fences = 0;                  // proxy fences of shared memory so far
};

struct Warp {
    Block* block = nullptr;
    u32 index = 0, agent = 0;
    Clock clock, fenced;
    u32 copies = 0;             // started so far
    u32 remote_copies = 0;      // from other ranks, in flight
    u32 live = 0, ready = 0;    // lanes, as bit masks
    bool queued = false;
    u32 version = 1;            // of the clock
    // Warp-wide operations: values of this one and of the one before, which some lanes may not have read yet.
    u32 arrived = 0, generation = 0;
    u64 values[2][kLanes];
    const char* operation = nullptr;
    Lane lanes[kLanes];

    u32 copy_agent() const { return agent + 1; }
    /// Others may now know of all that this warp has done.
    void release_to(Clock& other) {
        other.join(clock);
        clock.tick(agent), ++version;
    }
    /// Who sees a later relaxed store or addition knows what is known so far.
    void fence_device() { fenced.join(clock), clock.tick(agent), ++version; }
    /// What is known so far, later copies may see.
    void fence() { clock.fence(), clock.tick(agent), ++version; }
    void acquire(const Clock& other) { clock.join(other), ++version; }
};

/// A hardware barrier of a block, also __syncthreads.
struct NamedBarrier {
    u32 arrived = 0, expected = 0, generation = 0;
    Clock gathering, published;
    u32 joined[kBlockWarps] = {}, learned[kBlockWarps] = {};   // versions of warps that came, generations that went
    std::vector<Lane*> waiting;
};

inline Lane* now = nullptr;   // who runs
inline jmp_buf machine_context;

// ---- the dice
struct Dice {
    u64 state = 1;
    u32 next() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return static_cast<u32>(state >> 16);
    }
    u32 below(u32 n) { return static_cast<u32>(u64(next()) * n >> 32); }
    bool chance(u32 percent) { return below(100) < percent; }
};
inline Dice dice;

/// Percentages and victims of a run.
struct Mood {
    u32 interrupt = 10, stay = 50, copy = 30;   // leave a warp at an access; go on with it; finish a copy first
    i32 rank = -1, block = -1, warp = -1;       // starved: chosen only now and then
};
inline Mood mood;

[[noreturn]] void fail(const std::string& what);
std::string name_of(const Lane* lane);

// ---- switching
__attribute__((noinline)) inline void leave() {
    if (_setjmp(now->context) == 0) _longjmp(machine_context, 1);
}
inline void make_ready(Lane& lane);

/// Waits until somebody makes this lane ready.
inline void sleep(const char* what, u64 detail = 0) {
    now->waits = what, now->detail = detail;
    now->warp->ready &= ~(1u << now->index);
    leave();
    now->waits = nullptr;
}
inline bool interrupted = false;   // the warp that runs shall stop

/// A place where others may get ahead.
inline void maybe_leave() {
    if (dice.chance(mood.interrupt)) interrupted = true, leave();
}

// ---- ready warps
inline std::vector<Warp*> ready_warps;

inline void make_ready(Lane& lane) {
    Warp& warp = *lane.warp;
    if ((warp.live >> lane.index & 1) == 0) return;   // has ended since it was entered in a list
    warp.ready |= 1u << lane.index;
    if (!warp.queued) warp.queued = true, ready_warps.push_back(&warp);
}
inline void wake(std::vector<Lane*>& waiting) {
    for (Lane* lane : waiting) make_ready(*lane);
    waiting.clear();
}

// ---- stacks
constexpr std::size_t kStackBytes = 64 << 10;
void* take_stack();
void give_stack(void* stack);

void thread_main();   // of a lane

__attribute__((noinline)) inline void enter(Lane& lane) {
    now = &lane;
    if (_setjmp(machine_context) != 0) return;
    if (lane.started) _longjmp(lane.context, 1);
    lane.started = true;
    lane.stack = take_stack();
    static ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = lane.stack, fresh.uc_stack.ss_size = kStackBytes, fresh.uc_link = nullptr;
    makecontext(&fresh, thread_main, 0);
    setcontext(&fresh);
}

/// Runs lanes of a warp until all wait or the dice say stop.
inline void run_warp(Warp& warp) {
    interrupted = false;
    const u32 first = dice.below(kLanes);
    while (warp.ready != 0 && !interrupted) {
        const u32 rotated = warp.ready >> first | (first ? warp.ready << (kLanes - first) : 0);
        enter(warp.lanes[(first + __builtin_ctz(rotated)) % kLanes]);
    }
}

// ---- warp-wide operations
/// Every living lane gives a value; lane `l`'s is `values[l]` of the result.
inline const u64* meet_warp(const char* operation, u64 value) {
    Warp& warp = *now->warp;
    const u32 generation = warp.generation;
    u64* values = warp.values[generation & 1];
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) fail(std::string("lanes of a warp meet at ") + warp.operation + " and " + operation);
    values[now->index] = value;
    warp.arrived |= 1u << now->index;
    if (warp.arrived == warp.live) {
        warp.arrived = 0, ++warp.generation;
        for (u32 l = 0; l < kLanes; ++l)
            if (warp.live >> l & 1) make_ready(warp.lanes[l]);
    } else {
        while (warp.generation == generation) sleep(operation);
    }
    return values;
}

}  // namespace sim
