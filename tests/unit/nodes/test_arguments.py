"""A bool is no number and a number no bool: also where one that equals it was taken before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import megamoe_jit as mm
from tests.unit.layer.test_calls import L1, L2, Cuda, refused
from tests.unit.layer.test_checks_hostile import LAYER, REFUSALS, attack
from tests.unit.nodes.test_one_node import buffer_of


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> mm.MultiNodeBuffer:
    Cuda(monkeypatch).kernel = lambda params: None
    return buffer_of(2)


def test_calls(buffer: mm.MultiNodeBuffer):
    """After calls with True and with one block, which `1` and `True` equal."""
    y = torch.empty(1, 256, dtype=torch.bfloat16)
    buffer.prepare(True)
    mm.fp8_mega_moe_multinode(y, L1, L2, buffer, num_sms=1)
    under_way = buffer.dispatch(1)

    def call(**more: object) -> None:
        mm.fp8_mega_moe_multinode(y, L1, L2, buffer, **more)

    def compute(**more: object) -> None:
        buffer.compute(under_way, L1, L2, **more)

    for action in (buffer.prepare, call, compute):
        refused(lambda action=action: action(fast_math=1), "fast_math = 1 is not supported; allowed: True or False")
    for action in (call, compute):
        for said, more in (
            ("num_sms = True is not supported; allowed: 1 to", {"num_sms": True}),
            ("num_sms = 0 is not supported; allowed: 1 to", {"num_sms": 0}),
            ("activation_clamp = True is not supported", {"activation_clamp": True}),
            ("unknown kernel variant True", {"variant": True}),
        ):
            refused(lambda action=action, more=more: action(**more), said)
    compute(num_sms=1)
    buffer.combine(under_way, y)
    refused(lambda: call(padded_tokens=True), "padded_tokens = True is not supported")
    refused(lambda: buffer.dispatch(True), "tokens = True is not supported")
    refused(lambda: buffer.dispatch(1, True), "padded_tokens = True is not supported")


@pytest.mark.parametrize(
    "name", ["num_max_tokens_per_rank", "num_topk", "chunks", "comm_ctas", "timeout_s", "max_pool_rows"]
)
def test_buffers(name: str):
    sizes = {"num_experts": 8, "num_max_tokens_per_rank": 4, "num_topk": 2, "hidden": 256, "intermediate_hidden": 128}
    topology = mm.NodeTopology(None)
    refused(lambda: mm.get_multinode_buffer_for_mega_moe(topology, **{**sizes, name: True}), " = True is not supported")


def test_every_argument_of_a_buffer_and_of_a_layer(monkeypatch: pytest.MonkeyPatch):
    Cuda(monkeypatch)
    topology = mm.NodeTopology(None)
    sizes = {"num_experts": 8, "num_max_tokens_per_rank": 4, "num_topk": 2, "hidden": 256, "intermediate_hidden": 128}
    ways = {"exchange": "auto", "partial": "bf16", "chunks": "auto", "comm_ctas": None, "timeout_s": None}
    given = {"topology": topology, **sizes, "num_shared_experts": 0, "device": "cpu", **ways}
    assert attack(mm.get_multinode_buffer_for_mega_moe, given, REFUSALS) == []
    assert attack(mm.MegaMoE, {**LAYER, "topology": topology}, REFUSALS) == []


def test_places_of_ranks():
    refused(lambda: mm.NodeTopology(None, ranks_per_node=True), "ranks_per_node = True is not supported")


def test_exchanges_of_other_engines():
    engine = SimpleNamespace(dispatch=print, combine=print)
    refused(lambda: mm.DeepEpExchange(engine, wait_for_counts=1), "wait_for_counts = 1 is not supported")
    for place in range(3):
        sizes = [8, 4, 512]
        sizes[place] = True
        refused(lambda sizes=sizes: mm.NcclEpExchange(None, *sizes), " = True is not supported; allowed: 1 or more")
    refused(lambda: mm.NcclEpExchange(None, 8, 4, 512, max_num_sms=True), "max_num_sms = True is not supported")
