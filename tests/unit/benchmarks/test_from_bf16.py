"""benchmarks/from_bf16.py, with the reference in the layer's place and a clock that stands in for CUDA's."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import frame, from_bf16, from_bf16_ranks, launch_cost
from megamoe_jit._bench import clock as _clock
from megamoe_jit._bench import on_ranks
from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._check.spawn import World
from megamoe_jit._layer.quantize import quantize_activations
from megamoe_jit._spec import MoEShape
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.reference import moe_reference
from tests.unit.bench.test_measure import CONDITIONS, SMALL, Clock

ANCHORS = {"dense_fp8_8192_tflops": 1300.0, "read_4gib_tb_s": 4.2}
TINY = Preset("tiny", MoEShape(128, 128, 8, 2), ranks=4, source="")


class Package:
    """`megamoe_jit` over the reference: a call of the kernel takes 100 us of the clock, of the layer 101 and 2 %."""

    def __init__(self) -> None:
        self.alive, self.error, self.most = 0, 0.0, 0
        package = self

        class MegaMoE:
            def __init__(self, l1, l2, *, topk, max_tokens, clamp):
                package.alive += 1
                package.most = max(package.most, package.alive)
                self.l1, self.l2, self.clamp = l1, l2, clamp
                hidden = l1[0].shape[2]
                self.buffer = SimpleNamespace(
                    x=torch.zeros(max_tokens, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
                    x_sf=torch.zeros(max_tokens, hidden // 128),
                    topk_idx=torch.full((max_tokens, topk), -1),
                    topk_weights=torch.zeros(max_tokens, topk),
                    check=lambda: None,
                )

            def __call__(self, x, topk_idx, topk_weights):
                Clock.now += 0.101 if x.shape[0] < 4 else 0.102
                y = moe_reference(
                    *quantize_activations(x), topk_idx, topk_weights, self.l1, self.l2, activation_clamp=self.clamp
                )
                return y + package.error

            def destroy(self):
                package.alive -= 1

        self.MegaMoE = MegaMoE

    def fp8_mega_moe(self, y, l1, l2, buffer, *, activation_clamp):
        Clock.now += 0.1
        views = (view[: y.shape[0]] for view in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights))
        y.copy_(moe_reference(*views, l1, l2, activation_clamp=activation_clamp))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    it, ticks = Package(), itertools.count()
    watch = SimpleNamespace(perf_counter=lambda: next(ticks) * 5e-6)

    def replayed(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        call()
        return call

    for owner, name, stand_in in (
        (from_bf16, "mm", it),
        (from_bf16, "captured", replayed),
        (frame, "require_hopper", lambda: torch.device("cpu")),
        (from_bf16, "FLUSH_BYTES", 16),
        (from_bf16, "anchors", lambda: ANCHORS),
        (frame, "environment", lambda commit: {**CONDITIONS, "commit": commit}),
        *((each, "preset", {"small": SMALL, "tiny": TINY}.__getitem__) for each in (frame, from_bf16)),
        (from_bf16, "HOST_ROUNDS", 1),
        (from_bf16, "CHAIN_SHAPE", TINY.shape),
        (from_bf16, "CHAIN_ROUNDS", 2),
        (from_bf16, "MEMORY_SHAPE", "tiny"),
        (_clock, "WARMUP", 0),
        (_clock, "TIMED", 2),
        (from_bf16, "MEMORY_TOKENS", 16),
        (launch_cost, "time", watch),
        (torch.cuda, "Event", Clock),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "_sleep", lambda *_: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "memory_allocated", lambda device: 1 << 30),
        (torch.cuda, "reset_peak_memory_stats", lambda device: None),
        (torch.cuda, "max_memory_allocated", lambda device: (1 << 31) + 3 * tiny_weights()),
    ):
        monkeypatch.setattr(owner, name, stand_in, raising=False)
    return it


def tiny_weights() -> int:
    weights = make_weights(MoEShape(128, 128, 2, 2), "cpu")
    return sum(tensor.nbytes for tensor in (*weights.l1, *weights.l2))


def test_a_row_has_kernel_graph_eager_and_host_beside_an_empty_operation(package: Package):
    few, more = from_bf16.rows_of([SMALL], [3, 5], torch.device("cpu"))
    assert (few["shape"], few["tokens"], few["correct"]) == ("small", 3, True)
    names = ("kernel_us", "kernel_graph_us", "layer_graph_us", "layer_eager_us", "more_us", "more_percent")
    assert [few[name] for name in names] == [100.0, 100.0, 101.0, 101.0, 1.0, 1.0]
    assert [more[name] for name in names] == [100.0, 100.0, 102.0, 102.0, 2.0, 2.0]
    assert [few[f"host_{what}_us"] for what in ("layer", "kernel", "empty_op")] == [5.0, 5.0, 5.0], "one tick each"
    assert package.alive == 0


def test_a_layer_that_is_wrong_is_said_so(package: Package):
    package.error = 1.0
    (row,) = from_bf16.rows_of([SMALL], [3], torch.device("cpu"))
    assert not row["correct"]
    assert from_bf16.line(row).endswith("WRONG")


def test_a_layer_that_does_not_stage_is_wrong(package: Package, monkeypatch: pytest.MonkeyPatch):
    def unstaged(self, x, topk_idx, topk_weights):
        y = torch.empty_like(x)
        package.fp8_mega_moe(y, self.l1, self.l2, self.buffer, activation_clamp=self.clamp)
        return y

    monkeypatch.setattr(package.MegaMoE, "__call__", unstaged)
    (row,) = from_bf16.rows_of([SMALL], [3], torch.device("cpu"))
    assert not row["correct"]


def test_the_chain_is_one_of_layers(package: Package):
    found = from_bf16.chain(torch.device("cpu"))
    assert (found["layers"], package.most, package.alive) == (8, 8, 0)
    assert (found["eager_us"], found["graph_us"], found["eager_over_graph"]) == (0.62, 0.62, 1.0), "of one layer"
    assert found["correct"]
    package.error = math.nan
    assert not from_bf16.chain(torch.device("cpu"))["correct"]


def test_memory_is_what_is_beside_the_weights(package: Package):
    found = from_bf16.memory(torch.device("cpu"), 3, 16)
    assert (found["layers"], found["tokens"], found["beside_gib"], package.alive) == (3, 16, 1.0, 0)


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_document(package: Package, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture, error: float):
    package.error = error
    output = tmp_path / "rows.json"
    words = ["--shapes", "tiny,small", "--tokens", "5,1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["from_bf16.py", *words])
    assert from_bf16.main() == bool(error)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [["tiny", "1"], ["tiny", "5"], ["small", "1"], ["small", "5"]]
    assert lines[5].startswith("chain of 8 small layers")
    assert lines[6].startswith("43 layers of tiny, 16 tokens")
    doc = json.loads(output.read_text())
    assert (doc["kind"], doc["anchors"], doc["environment"]["device"]) == ("from_bf16", [ANCHORS] * 2, "NVIDIA H200")
    assert [(row["shape"], row["tokens"]) for row in doc["rows"]] == [
        ("tiny", 1),
        ("tiny", 5),
        ("small", 1),
        ("small", 5),
    ]
    assert (doc["chain"]["layers"], doc["memory"]["layers"]) == (8, 43)


class Buffer(SimpleNamespace):
    """Of all ranks; whether its kernels were prepared, and whether it is gone."""

    def prepare_all(self, weight_format: str) -> None:
        self.prepared = weight_format

    def destroy(self) -> None:
        self.gone = True


@pytest.fixture
def ranks(package: Package, monkeypatch: pytest.MonkeyPatch) -> list[Buffer]:
    """Two ranks, of which the second takes twice as long, each with what is this one's; buffers as they are made."""
    made: list[Buffer] = []

    def buffer(group: object, experts: int, tokens: int, topk: int, hidden: int, *_: int, device: object) -> Buffer:
        layer = package.MegaMoE((torch.empty(experts, 2, hidden),), None, topk=topk, max_tokens=tokens, clamp=10.0)
        made.append(Buffer(**vars(layer.buffer)))
        return made[-1]

    def both(group: object, part: dict) -> list[dict]:
        return [part, {**part, "times": {name: 2 * us for name, us in part["times"].items()}}]

    def from_bf16_of_all(x, topk_idx, topk_weights, l1, l2, buffer, *, activation_clamp):
        Clock.now += 0.101
        batch = *quantize_activations(x), topk_idx, topk_weights
        return moe_reference(*batch, *package.drawn, activation_clamp=activation_clamp) + package.error

    def kernel(y, l1, l2, buffer, *, activation_clamp):
        Package.fp8_mega_moe(package, y, *package.drawn, buffer, activation_clamp=activation_clamp)

    def draw(*given: object) -> object:
        weights = make_weights(*given)
        package.drawn = (weights.l1, weights.l2)
        return weights

    package.get_symm_buffer_for_mega_moe = buffer
    package.transform_weights_for_mega_moe_sm90 = lambda l1, l2: (l1, l2)
    package.fp8_mega_moe = kernel
    monkeypatch.setattr(on_ranks, "megamoe_jit", package)
    monkeypatch.setattr(on_ranks, "make_weights", draw)
    for name, stand_in in (
        ("mm", package),
        ("gather", both),
        ("mega_moe_from_bf16", from_bf16_of_all),
        ("require_hopper", lambda: None),
        ("environment", lambda: dict(CONDITIONS)),
        ("anchors", lambda: ANCHORS),
        ("RankTimer", lambda device: SimpleNamespace(burst=lambda calls: _clock.burst(calls, torch.empty(16)))),
    ):
        monkeypatch.setattr(from_bf16_ranks, name, stand_in)
    return made


def test_a_row_of_several_ranks_is_that_of_the_slowest(ranks: list[Buffer]):
    said: list[dict] = []
    world = World(0, 2, torch.device("cpu"), said.append)
    found = from_bf16_ranks.measure_on_rank(world, [["small", 128, 128, 4, 2, "fp8"]], [3, 5])
    assert [(row["shape"], row["tokens"], row["correct"], row["weights"]) for row in said] == [
        ("small", 3, True, "fp8"),
        ("small", 5, True, "fp8"),
    ]
    assert [said[0][f"{name}_us"] for name in ("kernel", "kernel_graph", "layer_graph", "layer_eager")] == [
        200.0,
        200.0,
        202.0,
        202.0,
    ]
    assert found["anchors"] == [ANCHORS] * 2
    assert [(buffer.prepared, buffer.gone, len(buffer.x)) for buffer in ranks] == [("fp8", True, 5)]


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_document_of_several_ranks(
    package: Package, ranks: list[Buffer], monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture, error: float
):
    def collect(target: str, count: int, arguments: dict, *, on_report: Callable) -> list[dict]:
        assert (target, count) == ("benchmarks.from_bf16_ranks:measure_on_rank", 2)
        world = World(0, 2, torch.device("cpu"), lambda row: on_report(0, row))
        return [from_bf16_ranks.measure_on_rank(world, **arguments)] * 2

    package.error, output = error, tmp_path / "rows.json"
    monkeypatch.setattr(on_ranks, "collect", collect)
    monkeypatch.setattr(from_bf16, "PACKED_SHAPES", ("tiny",))
    words = ["--ranks", "2", "--shapes", "tiny", "--tokens", "4,1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["from_bf16.py", *words])
    assert from_bf16.main() == bool(error)
    doc = json.loads(output.read_text())
    assert (doc["kind"], doc["environment"]["ranks"], doc["anchors"]) == ("from_bf16", 2, [ANCHORS] * 2)
    rows = [(row["weights"], row["tokens"], row["correct"]) for row in doc["rows"]]
    assert rows == [("fp8", 1, not error), ("fp8", 4, not error), ("mxfp4", 1, not error), ("mxfp4", 4, not error)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["tiny"] * 2
    assert [line[:2] for line in lines[3:]] == [["tiny", "mxfp4"]] * 2


def test_too_few_gpus_are_said_so(package: Package, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["from_bf16.py", "--ranks", "2", "--shapes", "tiny"])
    assert from_bf16.main() == 3
    assert "ranks = 2 needs 2 GPUs; allowed: up to 1 here" in capsys.readouterr().out
