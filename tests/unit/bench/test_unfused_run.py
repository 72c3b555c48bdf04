"""The unfused layer made ready to be timed: what a captured graph needs stays alive as long as it is replayed."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from megamoe_jit._bench import contenders as _contenders
from megamoe_jit._bench import unfused_run as _baseline_run
from megamoe_jit._bench.contenders import Unfused
from megamoe_jit._bench.grouped_gemm import Dequantised
from megamoe_jit._bench.unfused import Baseline, Task
from megamoe_jit._check.scenarios import Scenario, make_inputs, make_weights
from megamoe_jit._spec import MoEShape

SHAPE = MoEShape(256, 384, 8, 3)


class Graph:
    """A CUDA graph: it knows addresses, so it keeps nothing alive."""

    made: list[Graph] = []

    def __init__(self) -> None:
        self.needs: list[weakref.ref] = []
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        assert self.needs
        assert all(need() is not None for need in self.needs), "a replay reads memory that was freed"
        self.replays += 1


class Watched(Baseline):
    """Notes what a capture reads."""

    def __call__(self) -> torch.Tensor:
        if Watched.capturing is not None:
            tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
            held = (self, *tensors, self.exchange.first, self.first.matrices, self.second.matrices)
            Watched.capturing.needs = [weakref.ref(each) for each in held]
        return super().__call__()

    capturing: Graph | None = None


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: Graph, **_: object):
        Watched.capturing = graph
        yield
        Watched.capturing = None

    def refuse(function: object) -> object:
        raise RuntimeError("not here")

    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(_contenders, "Baseline", Watched)


def test_a_replay_keeps_alive_what_the_graph_reads(on_the_cpu):
    weights = make_weights(SHAPE, "cpu")
    inputs = make_inputs(Scenario("b", SHAPE, 20, 20), "cpu", 0, weights)
    task = Task(inputs, weights, SHAPE.experts, 10.0)
    call, facts = _baseline_run.prepare(Unfused(Dequantised), task, lambda y: float(y.isnan().any()))
    assert facts == {"graph": True, "compiled": False, "reason": "", "diff": 0.0}
    (graph,) = Graph.made
    del inputs, weights, task
    gc.collect()
    call.run()
    assert graph.replays == 2
    layer = graph.needs[0]
    assert isinstance(layer(), Baseline)
    del call
    gc.collect()
    assert layer() is None, "nothing but the call keeps it, so this test would have seen it go"
