"""`verify --ranks` on the CPU: real ranks, a stand-in for the layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megamoe_jit._check import scenarios as _scenarios
from megamoe_jit._check import verify_ranks as _verify_ranks
from megamoe_jit._check.documents import Outcome
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import Runs
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from tests.ranks import forked

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
TABLE = tuple(Scenario(f"small.t{t}", MoEShape(256, 128, 4, 2), t, t + 5) for t in (5, 3, 8))
PATIENCE_S = 8.0  #: how long a rank waits for one that has failed


def on_rank(world: World, **arguments) -> int:
    """The runner with a table of its own."""
    _scenarios.SCENARIOS, _verify_ranks.COLLECTIVE_S = TABLE, PATIENCE_S
    return _verify_ranks.run_on_rank(world, **arguments)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(_scenarios, "SCENARIOS", TABLE)
    monkeypatch.setattr(_verify_ranks, "COLLECTIVE_S", PATIENCE_S)
    collect = _verify_ranks.collect
    target = "tests.unit.check.test_verify_ranks:on_rank"
    monkeypatch.setattr(_verify_ranks, "collect", lambda _, *more, **named: collect(target, *more, **named))
    with forked():

        def run(progress=lambda _: None, **how):
            options = {"device": "cpu", "api": "tests.unit.layer.rank_layer"}
            return _verify_ranks.run_ranks(2, Runs(**how), progress, **options)

        yield run


def test_outcomes_are_the_worst_over_ranks(run):
    seen = []
    outcomes = run(pattern="small.t5", variants=["pingpong", "cooperative"], progress=seen.append)
    assert outcomes == seen
    right, wrong = outcomes
    assert (right.name, right.variant, right.passed, right.reason) == ("small.t5", "pingpong", True, "")
    assert right.diff < 1e-9
    assert not wrong.passed
    assert wrong.reason.startswith("rank 1: diff ")
    assert wrong.diff > 0.01


def test_rounds_have_inputs_of_their_own_and_the_first_that_fails_is_the_last(run, monkeypatch, tmp_path):
    """Each rank late by a time of chance; the buffer is one for all rounds."""
    seeds = []
    monkeypatch.setenv("RANK_LAYER_LOG", str(log := tmp_path / "log"))
    right, wrong = run(pattern="small.t5", variants=["pingpong", "cooperative"], rounds=3, skew_us=2000)
    assert (right.passed, right.reason) == (True, "")
    assert wrong.reason.startswith("round 0: rank 1: diff ")
    seen = [line.split() for line in log.read_text().splitlines()]
    for rank in ("0", "1"):
        lines = [line for line in seen if line[0] == rank]
        assert [line[1] for line in lines] == ["buffer", "call", "call", "call", "buffer", "call"]
        inputs = [line[2] for line in lines if line[1] == "call"]
        assert len(set(inputs[:3])) == 3
        assert inputs[3] == inputs[0]
        seeds += inputs[:3]
    assert len(set(seeds)) == 6


def test_a_fault_of_one_rank_ends_the_run_on_all(run):
    outcomes = run(variants=["cooperative"])
    assert [(o.name, o.passed) for o in outcomes] == [("small.t5", False), ("small.t3", False)]
    assert outcomes[1].reason.endswith("rank 1: PeerTimeoutError: rank 1: missing: rank 0")
    assert math.isnan(outcomes[1].diff)


def test_what_fails_on_one_rank_stops_no_other_scenario(run, monkeypatch):
    """Refused before the buffer, in the call, or after it, by whatever error: the ranks stay in step."""
    monkeypatch.setenv("RANK_LAYER_FAILS", "5:buffer,3:call,8:after")
    refused = "rank 1: ConfigError: refused"
    found = [(o.name, o.variant, o.reason[o.reason.rfind("rank 1") :]) for o in run(variants=["auto", "pingpong"])]
    assert found == [
        *(("small.t5", "auto", refused), ("small.t5", "pingpong", refused)),
        *(("small.t3", "auto", refused), ("small.t3", "pingpong", "")),
        *(("small.t8", "auto", "rank 1: ValueError: odd"), ("small.t8", "pingpong", "")),
    ]


def test_scenarios_that_cannot_be_shared_are_left_out(monkeypatch):
    monkeypatch.setattr(_scenarios, "SCENARIOS", TABLE)
    assert [s.name for s in Runs("small").chosen(4)] == ["small.t5", "small.t3", "small.t8"]
    with pytest.raises(ConfigError, match="3 ranks can share evenly"):
        Runs("small").chosen(3)


def test_merging_keeps_a_figure_that_does_not_exist():
    ends = [Outcome("a", "b", 1e-5, math.nan, True, True, ""), Outcome("a", "b", 2e-5, 0.1, False, False, "bad")]
    merged = _verify_ranks._merged(ends)
    assert (merged.diff, merged.zero_rows_ok, merged.passed, merged.reason) == (2e-5, False, False, "rank 1: bad")
    assert math.isnan(merged.worst_row_diff)


def test_each_rank_gets_its_share_and_all_that_are_shared():
    shape = MoEShape(256, 128, 4, 2, shared=2)
    codes = torch.arange(6, dtype=torch.uint8)[:, None, None].expand(6, 2, 3).contiguous()
    pair = codes.view(torch.float8_e4m3fn), codes.float()
    for rank, own in enumerate(([0, 1, 4, 5], [2, 3, 4, 5])):
        mine, scales = _verify_ranks.share_of(pair, shape, rank, 2)
        assert (mine.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert mine.view(torch.uint8)[:, 0, 0].tolist() == scales[:, 1, 2].tolist() == own
    plain = _verify_ranks.share_of(pair, MoEShape(256, 128, 6, 2), 1, 3)
    assert plain[1].data_ptr() == pair[1][2:].data_ptr(), "a view, which keeps the mark"
