"""What a kernel compiled with `timeline=True` wrote down, as a Chrome or Perfetto trace and as figures per role.

The kernel's side is `kernels_src/comm/timeline.cuh`: for each block of threads and role, room for `RECORDS` records of
four 64-bit words: ``block << 16 | role << 8 | what``, an index, begin and end in nanoseconds of the device's timer.
Room that was not used is zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from megamoe_jit._spec.abi import RECORD_WORDS, RECORDS, Role, Span

ROLES = tuple(role.name.lower() for role in Role)  #: by their numbers, as are the spans
SPANS = tuple(span.name.lower() for span in Span)
WAITS = frozenset(name for name in SPANS if name.startswith("wait") or name.endswith("barrier"))  #: not busy


@dataclass(frozen=True, slots=True)
class Record:
    """What one role of one block did from when to when; nanoseconds of the device's timer."""

    block: int
    role: str
    what: str
    index: int  #: of a tile, its first row
    begin: int
    end: int


def words(blocks: int) -> int:
    """64-bit words to allocate, zeroed, for a launch of so many blocks."""
    return blocks * len(ROLES) * RECORDS * RECORD_WORDS


def decode(data: Any) -> list[Record]:
    """Read what the kernel wrote.

    Args:
        data: int64 tensor or array ``[n, 4]`` or ``[4 n]`` on the CPU.

    Returns:
        Records by begin; room that was not used is left out.
    """
    found = [
        Record(who >> 16, ROLES[who >> 8 & 255], SPANS[who & 255], index, begin, end)
        for who, index, begin, end in data.reshape(-1, RECORD_WORDS).tolist()
        if end
    ]
    return sorted(found, key=lambda record: record.begin)


def trace(records: Iterable[Record], title: str = "megamoe", blocks: Container[int] | None = None) -> dict[str, Any]:
    """A trace in the JSON form that chrome://tracing and ui.perfetto.dev open; its times are microseconds.

    Args:
        records: of one launch.
        title: of the GPU's row.
        blocks: these alone: a trace of all is large.
    """
    shown = [record for record in records if blocks is None or record.block in blocks]
    start = min((record.begin for record in shown), default=0)
    lines = {(r.block, r.role): r.block * len(ROLES) + ROLES.index(r.role) for r in shown}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}]
    for (block, role), line in sorted(lines.items(), key=lambda item: item[1]):
        name = {"name": f"block {block} {role}"}
        events.append({"ph": "M", "pid": 0, "tid": line, "name": "thread_name", "args": name})
    for r in shown:
        times = {"ts": (r.begin - start) / 1e3, "dur": (r.end - r.begin) / 1e3}
        category = "wait" if r.what in WAITS else "work"
        what = {"name": r.what, "cat": category, **times, "args": {"index": r.index}}
        events.append({"ph": "X", "pid": 0, "tid": lines[r.block, r.role], **what})
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def summary(records: Iterable[Record]) -> list[dict[str, Any]]:
    """For each role and what it did: how often, how long, and which share of the launch.

    Returns:
        `role`, `what`, `count`, `median_us`, `longest_us`, and `share`: the time of all blocks together over that of
        the launch times the blocks.  A line with `what` "busy" for each role adds up what is not waiting.
    """
    shown = list(records)
    if not shown:
        return []
    launch = max(r.end for r in shown) - min(r.begin for r in shown)
    room = max(1, launch * len({r.block for r in shown}))
    found = []
    for role in ROLES:
        mine = [r for r in shown if r.role == role]
        groups = {what: [r for r in mine if r.what == what] for what in dict.fromkeys(r.what for r in mine)}
        if mine:
            groups["busy"] = [r for r in mine if r.what not in WAITS]
        for what, some in groups.items():
            lengths = [r.end - r.begin for r in some] or [0]
            times = {"median_us": statistics.median(lengths) / 1e3, "longest_us": max(lengths) / 1e3}
            found.append({"role": role, "what": what, "count": len(some), **times, "share": sum(lengths) / room})
    return found
