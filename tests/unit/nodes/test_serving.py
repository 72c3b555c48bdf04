"""What layers of a model take of a topology: leases of one buffer; and how a row of the benchmark is made."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._bench.measure_nodes import _row
from megamoe_jit._check.scenarios import Scenario, make_weights
from megamoe_jit._spec import MXFP4
from tests.unit.layer.test_calls import DRAWN, HERE, SHAPE, Cuda, refused
from tests.unit.layer.test_moe import compute, expected, inputs


def raised(error: Exception) -> None:
    raise error


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    it = Cuda(monkeypatch)
    it.kernel = compute
    return it


def test_layers_share_a_buffer_until_the_last_one_is_destroyed(cuda: Cuda):
    topology = mm.NodeTopology(None)
    one, two = (topology.lease(SHAPE, 100, HERE, "shared") for _ in range(2))
    assert one.buffer is two.buffer
    assert one.buffer.num_experts == SHAPE.experts
    own, larger = topology.lease(SHAPE, 100, HERE, "own"), topology.lease(SHAPE, 101, HERE, "shared")
    assert len({id(it.buffer) for it in (one, own, larger)}) == 3
    copy = one.again()
    buffer = one.buffer
    for it in (one, two, two):
        it.release()
    refused(lambda: one.buffer, "this layer was destroyed")
    buffer.require_usable()
    copy.release()
    refused(buffer.require_usable, "this buffer was destroyed")
    assert topology.lease(SHAPE, 100, HERE, "shared").buffer is not buffer


def test_a_release_in_a_capture_can_be_made_again_after_it(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    topology = mm.NodeTopology(None)
    lease = topology.lease(SHAPE, 100, HERE, "shared")
    buffer = lease.buffer
    with monkeypatch.context() as capturing:
        capturing.setattr(buffer, "check", partial(raised, mm.CaptureError("capturing")))
        refused(lease.release, "capturing", kind=mm.CaptureError)
    assert lease.buffer is topology.lease(SHAPE, 100, HERE, "shared").buffer
    lease.release()
    refused(buffer.require_usable, "this buffer was destroyed")


def test_a_buffer_that_is_given_stays(cuda: Cuda):
    topology = mm.NodeTopology(None)
    buffer = topology.lease(SHAPE, 100, HERE, "own").buffer
    lease = topology.lease(SHAPE, 64, HERE, buffer)
    lease.release()
    buffer.require_usable()
    for asked, says in (
        ((SHAPE, 129, HERE, buffer), "workspace: a buffer for 128 tokens"),
        ((mm.MoEShape(256, 128, 8, 2), 64, HERE, buffer), "allowed: 64 tokens or more of MoEShape"),
        ((SHAPE, 64, HERE, "mine"), "workspace = 'mine' is not supported with a topology"),
    ):
        refused(lambda given=asked: topology.lease(*given), says)
    refused(lambda: mm.NodeTopology(None).lease(SHAPE, 64, HERE, buffer), "of this topology")


def test_layers_of_both_formats_have_one_buffer(cuda: Cuda):
    packed = make_weights(SHAPE, "cpu", weights=MXFP4)
    given = {"topk": 2, "max_tokens": 128, "topology": mm.NodeTopology(None)}
    layers = [mm.MegaMoE(each.l1, each.l2, **given) for each in (packed, DRAWN)]
    assert layers[0].buffer is layers[1].buffer


def test_a_layer_is_served(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    topology = mm.NodeTopology(None)

    def stage(it, x, ids, weights, **_):
        codes, scales = mm.quantize_activations(x)
        for view, value in zip(
            (it.x, it.x_sf, it.topk_idx, it.topk_weights), (codes, scales, ids, weights), strict=True
        ):
            view[: len(x)].copy_(value)
        return len(x)

    monkeypatch.setattr(mm.MultiNodeBuffer, "stage", stage)
    layer = mm.MegaMoE(DRAWN.l1, DRAWN.l2, topk=2, max_tokens=128, topology=topology)
    given = inputs(5)
    assert torch.equal(layer(*given), expected(*given, None))
    assert torch.equal(layer(*given, 7), expected(*given, None))
    assert "workspace=shared" in repr(layer)
    layer.check()
    layer.destroy()
    refused(lambda: layer(*given), "this layer was destroyed")


def test_a_row_is_that_of_the_slowest_rank():
    shape = mm.MoEShape(4096, 2048, 64, 6)
    topology = mm.NodeTopology(None)
    topology.nodes = 2

    def part(factor: float, **more) -> dict:
        times = {"whole": [310.0 * factor, 1e9, 1.0], "kernel": [200.0], "exchange": [90.0 * factor]}
        return {
            "exchange": "gather",
            "chunks": 1,
            "times": times,
            "baselines": {},
            "diff": 1e-6,
            "correct": True,
            **more,
        }

    row = _row(Scenario("v4-flash", shape, 64, 64), topology, "bf16", [part(1.0), part(1.1, diff=2e-6)])
    assert (row.whole_us, row.kernel_us, row.exchange_us) == pytest.approx((341.0, 200.0, 99.0))
    assert row.rest_us == pytest.approx(42.0)
    assert (row.diff, row.correct, row.nodes, row.exchange) == (2e-6, True, 2, "gather")
    assert row.sent_bytes == 64 * (4096 + 128 + 72 + 8192)
    wrong = _row(Scenario("v4-flash", shape, 64, 64), topology, "fp32", [part(1.0), part(1.0, correct=False)])
    assert (wrong.correct, wrong.sent_bytes) == (False, 64 * (4096 + 128 + 72 + 16384))
