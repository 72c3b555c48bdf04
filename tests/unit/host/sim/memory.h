// Global memory of all ranks: sections with bounds, and for every few bytes who wrote and who read them last.
//
// A read must be ordered after the last write, a write after all reads and the last write.  Whether something is ordered
// is asked of the vector clocks, so a missing release, acquire, barrier or proxy fence is found in every run that gets
// there, not only when the dice make it visible.
#pragma once
#include <cstring>
#include <unordered_map>

#include "threads.h"

namespace sim {

constexpr u32 kCellReaders = 6;

/// Shadow of 16 bytes of a section (of 4 in those with small elements, of 128 in those that are only read).  All zero at first.
struct Cell {
    Stamp writer, readers[kCellReaders];
    u8 by_copy, next_reader, writes;   // by the async proxy; to be replaced; since the host cleared it
};

struct Section {
    std::string name;
    u32 rank = 0, cell_bytes = 16;
    u8* base = nullptr;
    u64 bytes = 0;
    Cell* cells = nullptr;
    bool local = false;   // to its rank
};

/// What an access is made by: its clock, and the stamp that others will have to know.
struct Actor {
    const Clock* clock;
    Stamp stamp;
    bool copy;   // of the async proxy
    u32 rank;
};

/// What went from rank to rank in a run.  Loads and stores are counted lane by lane, bulk copies one by one.
struct Traffic {
    u64 small_loads, loads, loaded_bytes, small_stores, stores, signals;   // small: of less than 16 bytes
    u64 signals_of_a_lane, copies_in_flight;   // the most signals of one lane in a launch, copies of one warp at a time
};
inline Traffic traffic = {};

struct Memory {
    static constexpr u64 kPage = 1024;   // sections begin at multiples of it
    u8* arena = nullptr;
    u64 bytes = 0;
    std::vector<u16> pages;   // section + 1
    std::vector<Section> sections;
    struct Word { u32 version = 0; Clock clock; std::vector<Lane*> waiting; };
    std::unordered_map<const void*, Word> words;   // counters and signals

    void reserve(u64 size);
    /// Gives the section its place, at a multiple of kPage.
    Section& place(const std::string& name, u32 rank, bool local, u64 offset, u64 size);

    Section& find(const void* p, u64 size, const char* what) {
        const u64 offset = static_cast<const u8*>(p) - arena;
        const u16 page = offset < bytes ? pages[offset / kPage] : 0;
        if (page == 0) fail(std::string(what) + " outside of all buffers, by " + name_of(now));
        Section& s = sections[page - 1];
        if (static_cast<const u8*>(p) + size > s.base + s.bytes)
            fail(std::string(what) + " past the end of " + s.name + " of rank " + std::to_string(s.rank) + ", by " + name_of(now));
        return s;
    }
    void read(const void* p, u64 size, const Actor& by) {
        Section& s = find(p, size, "read");
        if (s.local && s.rank != by.rank) fail("rank " + std::to_string(by.rank) + " reads " + s.name + " of another rank");
        if (s.rank != by.rank) ++(size < 16 ? traffic.small_loads : traffic.loads), traffic.loaded_bytes += size;
        for (u64 i = at(s, p), end = at(s, static_cast<const u8*>(p) + size - 1); i <= end; ++i) {
            Cell& cell = s.cells[i];
            if (!by.clock->knows(cell.writer)) race(s, i, "reads", by.stamp, "without waiting for the write of", cell.writer);
            if (by.copy && !cell.by_copy && !by.clock->fenced(cell.writer))
                race(s, i, "copies", by.stamp, "without a proxy fence since the write of", cell.writer);
            note(cell, by.stamp);
        }
    }
    void write(void* p, u64 size, const Actor& by) {
        Section& s = find(p, size, "write");
        if (s.local && s.rank != by.rank) fail("rank " + std::to_string(by.rank) + " writes " + s.name + " of another rank");
        if (s.rank != by.rank) ++(size < 16 ? traffic.small_stores : traffic.stores);
        for (u64 i = at(s, p), end = at(s, static_cast<u8*>(p) + size - 1); i <= end; ++i) {
            Cell& cell = s.cells[i];
            if (!by.clock->knows(cell.writer)) race(s, i, "writes", by.stamp, "without waiting for the write of", cell.writer);
            for (const Stamp& reader : cell.readers)
                if (!by.clock->knows(reader)) race(s, i, "writes", by.stamp, "without waiting for the read of", reader);
            const u8 writes = cell.writes;
            cell = Cell{};
            cell.writer = by.stamp, cell.by_copy = by.copy, cell.writes = writes + 1;
        }
    }
    /// A counter or signal; its own rank's, unless the access has system scope.
    Word& word(const void* p, bool system, const Actor& by) {
        Section& s = find(p, 4, "atomic access");
        if (!system && s.rank != by.rank) fail(s.name + " of another rank is accessed with the scope of one GPU");
        if (!by.clock->knows(s.cells[at(s, p)].writer))
            race(s, at(s, p), "uses", by.stamp, "without waiting for the write of", s.cells[at(s, p)].writer);
        return words[p];
    }
    static u64 at(const Section& s, const void* p) { return (static_cast<const u8*>(p) - s.base) / s.cell_bytes; }

   private:
    static void note(Cell& cell, Stamp stamp) {
        for (Stamp& reader : cell.readers)
            if (reader.time == 0 || reader.agent == stamp.agent) {
                reader = stamp;
                return;
            }
        cell.readers[cell.next_reader++ % kCellReaders] = stamp;   // forgets one: may miss a race, never invents one
    }
    [[noreturn]] void race(const Section& s, u64 cell, const char* does, Stamp by, const char* how, Stamp other) const;
};
inline Memory memory;
inline u32 ranks = 1;
/// A rank that there is.
inline u32 existing(u32 rank) {
    if (rank >= ranks) fail("rank " + std::to_string(rank) + " is asked for by " + name_of(now));
    return rank;
}

std::string name_of(Stamp stamp);
}  // namespace sim
