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

from benchmarks import frame, from_bf16, launch_cost
from megamoe_jit._bench import clock as _clock
from megamoe_jit._check.scenarios import make_weights
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
        (from_bf16, "time", watch),
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
    assert from_bf16._line(row).endswith("WRONG")


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
