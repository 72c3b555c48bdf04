"""benchmarks/ranks.py and beside.py: what several ranks add to one, also beside the code of another checkout."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import frame, ranks
from benchmarks.beside import PACKAGE, put_beside
from megamoe_jit._bench import clock, on_ranks
from megamoe_jit._bench.clock import TimedCall
from megamoe_jit._check.scenarios import Weights, make_weights
from megamoe_jit._check.spawn import World
from megamoe_jit._spec import FP8, MoEShape
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.reference import moe_reference
from tests.unit.bench.test_measure import CONDITIONS, Clock


def test_a_checkout_beside_this_one_is_a_package_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = tmp_path / "older" / PACKAGE
    package.mkdir(parents=True)
    (package / "part.py").write_text("import megamoe_jit\nname = 'megamoe_jit::op'\n")
    (package / "__init__.py").write_text("from megamoe_jit import part\nold = True\n")
    (tmp_path / "older" / "kernels").mkdir()
    (tmp_path / "older" / "kernels" / "a.cuh").write_text("// megamoe_jit\n")
    (package / "kernels").symlink_to("../kernels")
    put_beside(tmp_path / "older", "megamoe_jit_beside_test", tmp_path / "copies")
    its = import_module("megamoe_jit_beside_test")
    assert its.old
    assert not hasattr(import_module(PACKAGE), "old")
    assert import_module("megamoe_jit_beside_test.part").name == "megamoe_jit_beside_test::op"
    copy = tmp_path / "copies" / "megamoe_jit_beside_test" / "kernels"
    assert not copy.is_symlink()
    assert (copy / "a.cuh").read_text() == "// megamoe_jit\n", "kernels stay as they are"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_rows_are_dealt_so_that_each_expert_has_as_many(count: int, first: int):
    local, slots = 5, 4
    routes = [torch.rand(40, local).topk(slots).indices for _ in range(count)]
    ids = [ranks.dealt(routes, local, rank, first) for rank in range(count)]
    for rank, mine in enumerate(ids):
        assert (mine.sort(dim=1).values.diff(dim=1) > 0).all(), "different experts in each row"
        to = (mine // local).unique().tolist()
        assert to == [r for r in range(count) if first == 0 or r != rank]
    rows = torch.cat(ids).flatten().bincount(minlength=count * local).reshape(count, local)
    assert torch.equal(rows, torch.stack([route.flatten().bincount(minlength=local) for route in routes]))


def part(one: float, half: float, everything: float, uniform: float, rows: list[int], **more: Any) -> dict[str, Any]:
    """What a rank measured, with a package before that took twice as long."""
    medians = {f"{PACKAGE} {mode}": us for mode, us in zip(ranks.MODES, (one, half, everything, uniform), strict=True)}
    medians |= {name.replace(PACKAGE, "before"): 2 * us for name, us in medians.items()}
    return {"medians": medians, "correct": True, "same_bits": True, "diff": 0.0, "expert_rows": rows, **more}


def test_a_row_has_the_largest_figures_and_the_experts_that_any_rank_reads():
    own = MoEShape(128, 128, 4, 3)
    world = SimpleNamespace(ranks=2, device=torch.device("cpu"))
    layer: Any = SimpleNamespace(name="small", shape=MoEShape(128, 128, 8, 3), own_shape=own, format=FP8, world=world)
    parts = [
        part(100.0, 104.0, 112.0, 106.0, [1, 0, 0, 0, 0, 0, 0, 2]),
        part(101.0, 103.0, 110.0, 105.0, [0, 0, 0, 5, 1, 1, 0, 0], same_bits=False),
    ]
    row = ranks._row(layer, 16, (PACKAGE, "before"), parts)
    assert [row[f"{mode}_us"] for mode in ranks.MODES] == [101.0, 104.0, 112.0, 106.0]
    assert row["before"] == {
        "one_us": 202.0,
        "half_us": 208.0,
        "all_us": 224.0,
        "uniform_us": 212.0,
        "same_bits": False,
    }
    read = 3 * FP8.expert_code_bytes(128, 128)  # experts 4, 5 and 7: the tokens of both ranks count
    assert row["weights_tb_s"] == pytest.approx(read * 1e-6 / 106.0)
    assert (row["experts"], row["ranks"], row["correct"]) == (4, 2, True)
    text = ranks.line_of(row)
    assert [word in text for word in ("+3.0", "OTHER BITS", "WRONG")] == [True, True, False]
    alone = ranks._row(layer, 16, (PACKAGE,), [{**parts[0], "correct": False}, parts[1]])
    assert alone["before"] is None
    assert ranks.line_of(alone).endswith("WRONG")


class Package:
    """A package over the reference, whose calls take 100 us of the clock on one rank and 104 on all, or twice that."""

    def __init__(self, known: dict[Any, torch.Tensor], factor: float = 1.0) -> None:
        self.known = known  #: outputs by what they are made of
        self.factor, self.error, self.alive, self.transformed = factor, 0.0, 0, 0
        self.weights: dict[int, Weights] = {}  #: by the number of experts

    def get_symm_buffer_for_mega_moe(self, group, experts, tokens, topk, hidden, intermediate, *, device):
        def destroy() -> None:
            self.alive -= 1

        self.alive += 1
        return SimpleNamespace(
            x=torch.zeros(tokens, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
            x_sf=torch.zeros(tokens, hidden // 128),
            topk_idx=torch.full((tokens, topk), -1),
            topk_weights=torch.zeros(tokens, topk),
            experts=experts,
            check=lambda: None,
            destroy=destroy,
        )

    def transform_weights_for_mega_moe_sm90(self, l1, l2):
        self.transformed += 1
        return l1, l2

    def fp8_mega_moe(self, y, l1, l2, buffer, *, activation_clamp):
        Clock.now += self.factor * (0.1 if buffer.experts == l1[0].shape[0] else 0.104)
        if not y.isnan().all():
            return  # timing needs no numbers
        views = [view[: y.shape[0]] for view in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]
        key = (id(l1[0]), buffer.experts, *buffer.topk_idx.flatten().tolist())
        if key not in self.known:  # to the other package neither
            its = self.weights[buffer.experts]
            self.known[key] = moe_reference(*views, its.l1, its.l2, activation_clamp=activation_clamp)
        y.copy_(self.known[key] + self.error)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Package]:
    """This checkout's and another one's, in the place of modules; a clock and ranks that stand in for CUDA's."""
    known: dict[Any, torch.Tensor] = {}
    found = {PACKAGE: Package(known), ranks.BEFORE: Package(known, 2.0)}

    def draw(shape: MoEShape, device: torch.device, seed: int, stored: Any) -> Weights:
        drawn, half = make_weights(shape, device, seed, stored), shape.experts // 2
        own = Weights(*(tuple(part[:half] for part in given) for given in (drawn.l1, drawn.l2)))
        for package in found.values():
            package.weights = {shape.experts: drawn, half: own}
        return drawn

    for owner, name, stand_in in (
        (ranks, "mm", found[PACKAGE]),
        (ranks, "import_module", found.__getitem__),
        (on_ranks, "megamoe_jit", found[PACKAGE]),
        (on_ranks, "make_weights", draw),
        (ranks, "gather", lambda group, part: [part, part]),
        (ranks, "environment", lambda: dict(CONDITIONS)),
        (ranks, "anchors", lambda: {"read_4gib_tb_s": 4.2}),
        (frame, "preset", {"tiny": Preset("tiny", MoEShape(128, 128, 4, 2), ranks=2, source="")}.__getitem__),
        (on_ranks, "FLUSH_BYTES", 16),
        (torch.distributed, "all_reduce", lambda tensor: None),
        (torch.cuda, "Event", Clock),
        *((torch.cuda, name, lambda *_: None) for name in ("synchronize", "_sleep", "empty_cache")),
    ):
        monkeypatch.setattr(owner, name, stand_in, raising=False)
    return found


@pytest.mark.parametrize(("error", "formats"), [(0.0, "fp8,mxfp4"), (1.0, "fp8")])
def test_the_document(packages, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture, error: float, formats: str):
    warmed: list[Any] = []

    def collect(target: str, count: int, arguments: dict[str, Any], *, on_report: Any) -> list[Any]:
        assert (target, count) == ("benchmarks.ranks:measure_on_rank", 2)
        plain = json.loads(json.dumps(arguments))  # as processes get them
        return [ranks.measure_on_rank(World(0, 2, torch.device("cpu"), lambda row: on_report(0, row)), **plain)] * 2

    packages[PACKAGE].error, output = error, tmp_path / "ranks.json"
    older = tmp_path / "older"
    (older / PACKAGE).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(on_ranks, "collect", collect)
    monkeypatch.setattr(ranks, "warm", lambda *given: warmed.append(given[1:]))
    monkeypatch.setattr(ranks, "refusal", lambda count: "")
    words = ["--shapes", "tiny", "--tokens", "16,24", "--before", str(older), "--output", str(output)]
    words += ["--weight-format", formats]
    monkeypatch.setattr(sys, "argv", ["ranks.py", *words])
    assert ranks.main() == bool(error)
    assert warmed == [(2, [PACKAGE, ranks.BEFORE], formats.split(","))]
    doc = json.loads(output.read_text())
    assert (doc["kind"], doc["environment"]["ranks"], len(doc["anchors"])) == ("ranks", 2, 2)
    rows = doc["rows"]
    cells = [("fp8", 16), ("fp8", 24), *([("mxfp4", 16)] if "mxfp4" in formats else [])]  # packed ones: of few tokens
    assert [(row["weights"], row["tokens"], row["correct"]) for row in rows] == [(*cell, not error) for cell in cells]
    for row in rows:
        assert [row[f"{mode}_us"] for mode in ranks.MODES] == pytest.approx([100, 104, 104, 104])
    assert rows[0]["before"]["same_bits"] is not bool(error)
    assert rows[0]["before"]["all_us"] == pytest.approx(208)
    assert all(row["before"] is None for row in rows[2:]), "only FP8 is timed with the other checkout"
    transformed = [(package.alive, package.transformed) for package in packages.values()]
    assert transformed == [(0, len(warmed[0][2])), (0, 1)], "each takes weights in its own order"
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["tiny", weights, str(tokens)] for weights, tokens in cells]


def test_rounds_of_a_timer_of_ranks(packages):
    """As many as asked for, else those of the protocol; all ranks are aligned before each call."""
    made = {"a": 0, "b": 0}

    def call(name: str) -> TimedCall:
        return TimedCall(lambda: made.update({name: made[name] + 1}))

    timer = on_ranks.RankTimer(torch.device("cpu"))
    times = timer.burst({name: call(name) for name in made}, warmup=2, timed=3)
    assert ({name: len(found) for name, found in times.items()}, made) == ({"a": 3, "b": 3}, {"a": 5, "b": 5})
    assert len(timer.burst({"a": call("a")})["a"]) == clock.TIMED
    assert made["a"] == 5 + clock.WARMUP + clock.TIMED
