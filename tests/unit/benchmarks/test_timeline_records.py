"""Records of a kernel's timeline: the same numbers as the kernel's, as a trace and as figures."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timeline_records import ROLES, SPANS, Record, decode, summary, trace, words
from megamoe_jit._spec.abi import RECORD_WORDS, RECORDS, Span

START = 1_700_000_000_000_000_000


def raw(block, role, what, index, begin, end):
    return [block << 16 | ROLES.index(role) << 8 | SPANS.index(what), index, START + begin, START + end]


DATA = torch.tensor(
    [
        raw(1, "publisher", "gemm1", 128, 4000, 9000),
        raw(0, "publisher", "gemm1", 0, 1000, 4000),
        raw(0, "publisher", "tail_barrier", 0, 4000, 10_000),
        [0, 0, 0, 0],
        raw(0, "head", "count", 0, 0, 500),
    ]
)


def test_names_and_room_are_those_of_the_kernel():
    assert ROLES == ("head", "activations", "dispatch", "publisher")
    assert len(SPANS) == 1 + max(Span)
    assert {"none", "count_barrier", "wait_rows", "gemm1", "combine"} <= set(SPANS)
    assert words(132) == 132 * 4 * RECORDS * RECORD_WORDS


@pytest.mark.parametrize("data", [DATA, DATA.view(-1), DATA.numpy()], ids=["rows", "flat", "numpy"])
def test_decode(data):
    records = decode(data)
    assert records[0] == Record(0, "head", "count", 0, START, START + 500)
    assert [(r.block, r.what) for r in records[1:]] == [(0, "gemm1"), (1, "gemm1"), (0, "tail_barrier")]
    assert decode(torch.zeros(8, 4, dtype=torch.int64)) == []


def test_a_trace_has_a_line_for_each_role_of_each_block():
    made = trace(decode(DATA), "NVIDIA H200")
    events = made["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == ["block 0 head", "block 0 publisher", "block 1 publisher"]
    assert events[0]["args"]["name"] == "NVIDIA H200"
    work = [e for e in events if e["ph"] == "X"]
    assert [(names[e["tid"]], e["name"], e["ts"], e["dur"], e["cat"]) for e in work] == [
        ("block 0 head", "count", 0.0, 0.5, "work"),
        ("block 0 publisher", "gemm1", 1.0, 3.0, "work"),
        ("block 1 publisher", "gemm1", 4.0, 5.0, "work"),
        ("block 0 publisher", "tail_barrier", 4.0, 6.0, "wait"),
    ]
    (only,) = (e for e in trace(decode(DATA), blocks=[1])["traceEvents"] if e["ph"] == "X")
    assert (only["ts"], only["args"]) == (0.0, {"index": 128})
    assert trace([])["traceEvents"][1:] == []


def test_summary():
    found = {(line["role"], line["what"]): line for line in summary(decode(DATA))}
    tiles = found["publisher", "gemm1"]
    assert (tiles["count"], tiles["median_us"], tiles["longest_us"]) == (2, 4.0, 5.0)
    assert tiles["share"] == pytest.approx(8 / 20)
    assert found["publisher", "busy"]["share"] == tiles["share"], "waiting at a barrier is not busy"
    assert found["head", "busy"]["count"] == 1
    assert summary([]) == []
