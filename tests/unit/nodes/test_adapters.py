"""Exchanges of other engines, with stand-ins for these that know the interface as it is published."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._nodes import nccl_ep as _nccl_ep
from megamoe_jit._nodes.calls import fp8_mega_moe_multinode
from megamoe_jit._nodes.choice import Choices, Rule
from tests.unit.nodes.world import (
    CPU,
    ROUTES,
    SHAPE,
    Meeting,
    batch,
    by_row,
    of_node,
    stage,
    thread_world,
    whole_weights,
)

WEIGHTS = whole_weights()
RANKS, CAPACITY = 4, 6


class Engine:
    """What both engines do: each rank gets a row that it has experts for once, in the order of ranks and tokens."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.num_ranks = meeting, rank, RANKS

    def send(self, x, x_sf, ids, weights):
        """Rows that arrive here, with numbers of the experts here, and whose token each is."""
        each = SHAPE.experts // RANKS
        assert ((ids >= -1) & (ids < SHAPE.experts)).all(), "an engine knows no other ids"
        everyone, kept, origin = self.meeting.exchange(self.rank, (x, x_sf, ids, weights)), [], []
        for rank, (codes, scales, their_ids, their_weights) in enumerate(everyone):
            local = their_ids - self.rank * each
            local = torch.where((local >= 0) & (local < each) & (their_ids >= 0), local, -1)
            wanted = (local >= 0).any(dim=1).nonzero().flatten()
            origin += [(rank, int(token)) for token in wanted]
            kept.append((codes[wanted], scales[wanted], local[wanted], their_weights[wanted]))
        parts = [
            [part.view(torch.uint8) if i == 0 else part for part in parts]
            for i, parts in enumerate(zip(*kept, strict=True))
        ]
        codes, scales, local, kept_weights = (torch.cat(part) for part in parts)
        return (codes.view(torch.float8_e4m3fn), scales, local, kept_weights), origin

    def sum(self, results, origin, tokens: int):
        """For each token of this rank the sum over ranks, in FP32."""
        total = torch.zeros(tokens, SHAPE.hidden)
        for their_results, their_origin in self.meeting.exchange(self.rank, (results, origin)):
            for row, (rank, token) in zip(their_results, their_origin, strict=False):
                if rank == self.rank:
                    total[token] += row.float()
        return total.bfloat16()


class ElasticBuffer(Engine):
    """DeepEP 2."""

    def dispatch(self, x, *, topk_idx, topk_weights, num_experts, num_max_tokens_per_rank, do_cpu_sync):
        assert num_experts == SHAPE.experts
        assert x[0].shape[0] <= num_max_tokens_per_rank
        arrived, origin = self.send(*x, topk_idx, topk_weights)
        if not do_cpu_sync:  # as many rows as there could have been, and garbage in the rest
            arrived = tuple(padded(tensor, RANKS * num_max_tokens_per_rank) for tensor in arrived)
        psum = torch.tensor([0, len(origin)], dtype=torch.int32)
        handle = SimpleNamespace(psum_num_recv_tokens_per_scaleup_rank=psum, origin=origin, tokens=x[0].shape[0])
        return arrived[:2], *arrived[2:], handle, None

    def combine(self, x, *, handle):
        assert x.dtype is torch.bfloat16
        assert not x[len(handle.origin) :].any(), "rows past the count were computed"
        return self.sum(x, handle.origin, handle.tokens), None, None


def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    whole = torch.full((rows, *tensor.shape[1:]), 0, dtype=tensor.dtype) if tensor.dtype is torch.int64 else None
    if whole is None:
        whole = torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype)
        whole.view(torch.uint8).fill_(0x7B)
    whole[: len(tensor)] = tensor
    return whole


def expected(rows) -> torch.Tensor:
    """Each rank's part in bf16, and their sum."""
    each, total = SHAPE.experts // RANKS, torch.zeros(len(rows), SHAPE.hidden)
    for rank in range(RANKS):
        here = (rows.topk_idx >= rank * each) & (rows.topk_idx < (rank + 1) * each)
        masked = type(rows)(rows.x, rows.x_sf, torch.where(here, rows.topk_idx, -1), rows.topk_weights)
        total += by_row(masked, WEIGHTS.l1, WEIGHTS.l2, None, torch.bfloat16).float()
    return total.bfloat16()


def run(make_exchange, chunks: int = 1) -> None:
    """Every route on 2 x 2 ranks."""
    lock = threading.Lock()

    def action(topology, rail, _):
        with lock:
            exchange = make_exchange(topology.rank)
        choices = Choices([exchange], None, Rule(SHAPE, topology.nodes, topology.ranks_per_node, exchange.name))
        buffer = mm.MultiNodeBuffer(topology, SHAPE, CAPACITY, CPU, choices, chunks=chunks)
        assert (buffer.local_experts, buffer.first_expert) == (4, 4 * topology.rank)
        l1, l2 = of_node(WEIGHTS, buffer.first_expert, buffer.local_experts)
        wrong = []
        for number, route in enumerate(ROUTES):
            rows = batch((0, 1, 4, 6)[(topology.rank + number) % 4], route, seed=topology.rank)
            stage(buffer, rows)
            y = torch.full((len(rows), SHAPE.hidden), float("nan"), dtype=torch.bfloat16)
            fp8_mega_moe_multinode(y, l1, l2, buffer)
            wrong += [] if torch.equal(y, expected(rows)) else [route]
        return wrong

    assert thread_world(2, 2, action) == [[]] * RANKS


@pytest.mark.parametrize(("waits", "chunks"), [(False, 1), (True, 1), (False, 2)])
def test_deep_ep(waits: bool, chunks: int):
    meeting = Meeting(RANKS)
    run(lambda rank: mm.DeepEpExchange(ElasticBuffer(meeting, rank), wait_for_counts=waits), chunks)


def test_deep_ep_is_told_from_other_things():
    with pytest.raises(mm.ConfigError, match="buffer: int given; allowed: a deep_ep.ElasticBuffer of DeepEP 2"):
        mm.DeepEpExchange(3)


@dataclass
class Bundle:
    """Of named tensors; each kind of NCCL-EP has some of these."""

    tokens: object = None
    topk_weights: object = None
    scales: object = None
    topk_idx: object = None
    recv_total_counter: object = None
    recv_topk_idx_kind: object = None
    quantization_recipe: object = None


class Handle:
    def __init__(self, engine: Engine, ids, info) -> None:
        self.engine = engine
        self.update(ids, layout_info=info, stream=0)

    def update(self, topk_idx, *, layout_info, stream) -> None:
        self.ids, self.info = topk_idx.buffer, layout_info

    def dispatch(self, inputs, outputs, *, config, stream) -> None:
        assert (config.quantization_recipe, self.info.recv_topk_idx_kind) == ("FWD", "LOCAL")
        given = inputs.tokens, inputs.scales, inputs.topk_weights
        codes, scales, weights = (tensor.buffer for tensor in given)
        arrived, self.origin = self.engine.send(codes, scales, self.ids, weights)
        self.tokens = len(codes)
        places = outputs.tokens, outputs.scales, outputs.topk_idx, outputs.topk_weights
        for place, rows in zip(places, arrived, strict=True):
            assert place.buffer.shape[0] == RANKS * self.engine.most, "as many as the group was made for"
            place.buffer.copy_(padded(rows, place.buffer.shape[0]))
        self.info.recv_total_counter.buffer.fill_(len(self.origin))

    def combine(self, inputs, outputs, *, stream) -> None:
        outputs.tokens.buffer.copy_(self.engine.sum(inputs.tokens.buffer, self.origin, self.tokens))

    def destroy(self) -> None:
        self.engine.destroyed.append("handle")


class NcclGroup:
    """As many handles as there are calls at a time."""

    def __init__(self, engine: Engine, config) -> None:
        self.engine, self.config, self.made = engine, config, 0

    def create_handle(self, layout, topk_idx, *, layout_info, stream) -> Handle:
        assert layout == "FLAT"
        self.made += 1
        assert self.made <= 2
        return Handle(self.engine, topk_idx, layout_info)

    def destroy(self) -> None:
        self.engine.destroyed.append("group")


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch):
    """The package `nccl.ep`; `engine` is set to that of the rank that makes an exchange next."""
    names = ("Algorithm", "ExpertIdKind", "Layout", "DispatchQuantizationRecipe")
    fake = ModuleType("nccl.ep")
    for name in names:
        setattr(fake, name, type(name, (), {"__getattr__": lambda self, value: value})())
    for name in (
        "LayoutInfo",
        "DispatchInputs",
        "DispatchOutputs",
        "DispatchConfig",
        "CombineInputs",
        "CombineOutputs",
    ):
        setattr(fake, name, Bundle)
    fake.GroupConfig = SimpleNamespace
    fake.Tensor = lambda buffer: SimpleNamespace(buffer=buffer)
    fake.Group = SimpleNamespace(create=lambda comm, config: NcclGroup(fake.engine, config))
    interop = ModuleType("nccl.ep.interop.torch")
    interop.get_nccl_comm_from_group = lambda group: "comm"
    for name, module in (("nccl", ModuleType("nccl")), ("nccl.ep", fake), ("nccl.ep.interop.torch", interop)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_nccl_ep, "ROW_ALIGN", 8)  # of the small layer here
    return fake


@pytest.mark.parametrize("chunks", [1, 2])
def test_nccl_ep(nccl, chunks: int):
    meeting, made = Meeting(RANKS), []

    def exchange(rank: int) -> mm.NcclEpExchange:
        nccl.engine = Engine(meeting, rank)
        nccl.engine.most, nccl.engine.destroyed = CAPACITY // chunks, []
        made.append(mm.NcclEpExchange(SimpleNamespace(size=lambda: RANKS), 16, CAPACITY // chunks, SHAPE.hidden))
        return made[-1]

    run(exchange, chunks)
    config = made[0]._group.config
    assert (config.num_experts, config.max_dispatch_tokens_per_rank) == (16, CAPACITY // chunks)
    assert (config.max_recv_tokens_per_rank, config.max_token_bytes) == (RANKS * (CAPACITY // chunks), 512)
    made[0].destroy()
    assert made[0]._group.engine.destroyed == ["handle"] * chunks + ["group"]


def test_nccl_ep_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nccl.ep", None)
    group = SimpleNamespace(size=lambda: 4)
    with pytest.raises(mm.ConfigError, match="NCCL-EP cannot be imported .*an environment with nccl-extensions"):
        mm.NcclEpExchange(group, 16, 8, 512)
    with pytest.raises(mm.ConfigError, match="hidden = 256 is not supported by NCCL-EP; allowed: a multiple of 512"):
        mm.NcclEpExchange(group, 16, 8, 256)


def test_results_in_float32_are_not_for_these():
    exchange = mm.DeepEpExchange(ElasticBuffer(Meeting(1), 0))
    topology = mm.NodeTopology(None)
    with pytest.raises(mm.ConfigError, match="partial = 'fp32' with exchange deep_ep; allowed: 'bf16'"):
        mm.get_multinode_buffer_for_mega_moe(
            topology, 4, 8, 2, 256, 128, exchange=exchange, partial="fp32", device="cpu"
        )
