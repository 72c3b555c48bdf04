"""Workspaces: who shares a buffer, when it is freed, what it takes, and batches that are larger than it."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._device.layout import buffer_layout
from megamoe_jit._layer import workspace
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.workspace import buffer_named
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MAX_TOKENS, Variant
from megamoe_jit._spec.abi import Wait
from megamoe_jit.heuristics.presets import preset
from tests.unit.layer.test_calls import DRAWN, HERE, SHAPE, Cuda, refused
from tests.unit.layer.test_moe import compute, cuda, expected, in_chunks, inputs, layer, made  # noqa: F401

pytestmark = pytest.mark.usefixtures("cuda")


def destroyed(buffer: SymmBuffer) -> bool:
    return buffer.buffer.numel() == 0


def test_layers_of_one_shape_and_capacity_share_a_buffer(made: list[SymmBuffer]):  # noqa: F811
    layers = [layer(max_tokens=tokens, clamp=clamp) for tokens, clamp in ((128, None), (100, 2.0), (1, None))]
    assert len({id(each.buffer) for each in layers}) == len(made) == 1
    others = [layer(max_tokens=129), layer(topk=3), layer(workspace="own"), layer(workspace="own")]
    assert len({id(each.buffer) for each in (layers[0], *others)}) == len(made) == 5


def test_the_layers_of_a_model_take_less_than_a_gigabyte_beside_their_weights(made: list[SymmBuffer]):  # noqa: F811
    model = torch.nn.ModuleList(layer() for _ in range(43))
    assert len(made) == 1
    assert made[0].layout.total_bytes == buffer_layout(SHAPE, 128).total_bytes
    shape = preset("v4-flash").shape
    for experts in (shape.experts, shape.experts // preset("v4-flash").ranks):
        assert buffer_layout(replace(shape, experts=experts), 8192).total_bytes < 1 << 30
    memory = {tensor.data_ptr() for each in model for tensor in each.buffers()}
    assert len(memory) == 43 * 4


def test_the_last_layer_frees_the_buffer_and_the_next_one_gets_another():
    one, two, three = layer(), layer(), layer()
    buffer, given = one.buffer, inputs(3)
    one.destroy()
    one.destroy()
    for use in (lambda: one(*given), lambda: one.stage(*given), one.check, lambda: copy.deepcopy(one)):
        refused(use, "this layer was destroyed; allowed: calls before destroy()")
    two(*given)
    two.destroy()
    assert not destroyed(buffer)
    three.destroy()
    three.destroy()
    assert destroyed(buffer)
    refused(lambda: three(*given), "this buffer was destroyed")
    fresh = layer()
    three.destroy()
    fresh(*given)
    assert not destroyed(fresh.buffer)


def test_layers_that_are_forgotten_need_no_destroy(cuda: Cuda):  # noqa: F811
    one, two = layer(), layer()
    buffer = one.buffer
    del two
    one.destroy()
    assert destroyed(buffer)
    name = layer()._workspace
    refused(lambda: buffer_named(name), "is of no layer in this process; allowed: none, since there is no layer")


def test_what_cannot_be_freed_in_a_capture_is_kept(cuda: Cuda):  # noqa: F811
    one = layer()
    cuda.capturing = True
    refused(one.destroy, "is capturing", kind=mm.CaptureError)
    cuda.capturing = False
    assert layer().buffer is one.buffer
    one(*inputs(3))


def test_a_layer_that_is_refused_leaves_the_buffer_to_the_others():
    one = layer()
    wrong = (DRAWN.l1[0], DRAWN.l1[1].half())
    refused(lambda: mm.MegaMoE(wrong, DRAWN.l2, topk=2, max_tokens=128), "w13 scales has dtype")
    one(*inputs(3))
    one.destroy()
    assert destroyed(one.buffer)


def test_a_buffer_that_failed_is_not_given_to_new_layers():
    failed = layer()
    failed.buffer.fault[:4] = torch.tensor([Wait.PEER_SIGNAL | 2 << 8, 0, 5, 0b10])
    refused(failed.check, "missing: rank 1", kind=mm.PeerTimeoutError)
    refused(lambda: copy.deepcopy(failed), "an earlier call failed", kind=mm.PeerTimeoutError)
    layer()(*inputs(3))


def test_a_given_buffer_stays_its_callers():
    buffer = SymmBuffer(SHAPE, 256, HERE)
    one, two = layer(workspace=buffer), layer(workspace=buffer, max_tokens=200)
    assert one.buffer is two.buffer is copy.deepcopy(one).buffer is buffer
    assert one._workspace == two._workspace != layer(max_tokens=256)._workspace
    one.destroy()
    two.destroy()
    assert not destroyed(buffer)
    refused(lambda: two(*inputs(3)), "this layer was destroyed")
    layer(workspace=buffer)(*inputs(3))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"workspace": "mine"}, "workspace = 'mine' is not supported; allowed: 'shared', 'own', or a SymmBuffer"),
        ({"workspace": None}, "workspace = None is not supported"),
        ({"max_tokens": 129}, "for 128 tokens of"),
        ({"topk": 3}, "allowed: one rank on cpu, 128 tokens or more of MoEShape"),
    ],
)
def test_a_workspace_that_does_not_fit_is_refused(wrong: dict[str, object], says: str):
    refused(lambda: layer(**{"workspace": SymmBuffer(SHAPE, 128, HERE), **wrong}), says)


def test_a_destroyed_buffer_is_no_workspace():
    buffer = SymmBuffer(SHAPE, 128, HERE)
    buffer.destroy()
    refused(lambda: layer(workspace=buffer), "this buffer was destroyed")


def test_copies_share_what_their_layer_shares():
    one, own = layer(), layer(workspace="own")
    same, other = copy.deepcopy(one), copy.deepcopy(own)
    assert same.buffer is one.buffer
    assert other.buffer is not own.buffer
    assert other._workspace != own._workspace
    one.destroy()
    same(*inputs(3))
    own.destroy()
    other(*inputs(3))


def test_calls_of_layers_that_share_are_ordered_across_streams(cuda: Cuda):  # noqa: F811
    one, two = layer(), layer()
    one(*inputs(3))
    cuda.events.clear()
    cuda.stream = cuda.b
    two(*inputs(3))
    assert [event for event in cuda.events if event[0] != "use"] == [("wait", "B", "A"), ("launch", "B")]


@pytest.mark.parametrize("tokens", [129, 144, 256, 300])
def test_a_batch_larger_than_the_buffer_is_served_in_chunks(cuda: Cuda, tokens: int):  # noqa: F811
    cuda.kernel = compute
    given, it = inputs(tokens), layer(clamp=0.02)
    y = it(*given)
    assert torch.equal(y, in_chunks(lambda *rows: expected(*rows, 0.02), *given))
    assert [launch.params.tokens for launch in cuda.launches] == [128] * (tokens // 128) + [tokens % 128] * (
        tokens % 128 > 0
    )
    refused(lambda: it.stage(*given), f"x has {tokens} tokens; allowed: at most 128, the layer's max_tokens")


def test_chunks_take_the_kernel_that_one_call_takes(cuda: Cuda):  # noqa: F811
    with override(cooperative_threshold=200):
        layer()(*inputs(300))
        layer()(*inputs(100))
    variants = [launch.spec.variant for launch in cuda.launches]
    assert variants == [Variant.COOPERATIVE] * 3 + [Variant.PINGPONG]


def test_a_large_batch_that_is_refused_launches_nothing(cuda: Cuda):  # noqa: F811
    x, ids, weights = inputs(300)
    refused(lambda: layer()(x, ids[:299], weights), "topk_idx has shape (299, 2); allowed: (300, 2)")
    assert cuda.launches == []


def test_a_batch_may_be_larger_than_any_buffer(cuda: Cuda):  # noqa: F811
    tokens = MAX_TOKENS + 129
    layer(max_tokens=8192)(*inputs(tokens))
    assert [launch.params.tokens for launch in cuda.launches] == [8192] * 4 + [129]


def test_threads_that_make_layers_at_once_share_one_buffer(made: list[SymmBuffer]):  # noqa: F811
    with ThreadPoolExecutor(8) as pool:
        layers = list(pool.map(lambda _: layer(), range(16)))
        assert len(made) == len({id(each.buffer) for each in layers}) == 1
        list(pool.map(lambda each: each.destroy(), layers))
    assert destroyed(made[0])


def test_a_forked_child_has_a_lock_of_its_own():
    with workspace._lock:
        number = os.fork()
        if number == 0:
            os._exit(0 if workspace._lock.acquire(timeout=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
