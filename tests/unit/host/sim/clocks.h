// Who knows of whose work: one vector clock per warp, per barrier and per counter.
//
// Every warp has two agents, itself and the copies it has started, which run on their own; every rank's host has one.
// A clock says for each agent how much of its work is ordered before this point, and how much of that also by a proxy
// fence, without which copies of the async proxy need not see ordinary stores.
#pragma once
#include <cstddef>
#include <vector>

#include "base/types.cuh"

namespace sim {

using megamoe::u8, megamoe::u16, megamoe::u32, megamoe::u64, megamoe::i32, megamoe::i64;

/// A moment in the work of an agent; time 0 is before all work.
struct Stamp {
    u32 agent = 0, time = 0;
};

class Clock {
   public:
    static inline u32 agents = 0;   // of the whole simulation; set before the first clock is made

    Clock() : known_(2 * agents) {}

    /// What the other knows, this one knows from now on.
    void join(const Clock& other) {
        u32* mine = known_.data();
        const u32* theirs = other.known_.data();
        for (std::size_t i = 0, n = known_.size(); i < n; ++i) mine[i] = mine[i] < theirs[i] ? theirs[i] : mine[i];
    }
    void learn(Stamp s) {
        if (known_[s.agent] < s.time) known_[s.agent] = s.time;
    }
    bool knows(Stamp s) const { return known_[s.agent] >= s.time; }
    bool fenced(Stamp s) const { return known_[agents + s.agent] >= s.time; }
    u32 now(u32 agent) const { return known_[agent]; }
    /// Later work of this agent is not covered by what it has released so far.
    void tick(u32 agent) { ++known_[agent]; }
    /// A proxy fence over all that is known.
    void fence() {
        for (u32 i = 0; i < agents; ++i) known_[agents + i] = known_[i];
    }

   private:
    std::vector<u32> known_;   // by agent; then the same for what a proxy fence has covered
};

}  // namespace sim
