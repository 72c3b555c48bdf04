"""`mega_moe_local_experts`: rows that somebody else has brought, in three layouts, as many as the device counts."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import moe_reference
from tests.unit.layer.test_calls import DRAWN, HERE, L1, L2, SHAPE, Cuda, refused
from tests.unit.layer.test_moe import compute

ROWS = 12


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    it = Cuda(monkeypatch)
    it.kernel = compute
    return it


def fill(buffer: SymmBuffer, rows: int) -> None:
    """Rows of tokens, and garbage in all others: codes and scales that are NaN, ids that are experts."""
    buffer.x.view(torch.uint8).fill_(0x7F)
    buffer.x_sf.fill_(float("nan"))
    buffer.topk_idx.fill_(2)
    buffer.topk_weights.fill_(float("nan"))
    codes, scales = mm.quantize_activations(torch.randn(rows, buffer.hidden))
    buffer.x[:rows].copy_(codes)
    buffer.x_sf[:rows].copy_(scales)
    buffer.topk_idx[:rows] = torch.arange(rows * buffer.num_topk).view(rows, buffer.num_topk) % 5 - 1
    buffer.topk_weights[:rows] = torch.rand(rows, buffer.num_topk) + 0.5


def run(buffer: SymmBuffer, **more: object) -> torch.Tensor:
    y = torch.full((ROWS, buffer.hidden), float("nan"), dtype=torch.bfloat16)
    mm.mega_moe_local_experts(y, L1, L2, buffer, **more)
    return y


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("count", [0, 1, 7, ROWS])
def test_rows_past_the_count_are_zeros_whatever_lies_there(cuda: Cuda, count: int, dtype: torch.dtype):
    buffer = SymmBuffer(SHAPE, 128, HERE)
    fill(buffer, count)
    given = [view[:count].clone() for view in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]
    y = run(buffer, num_rows=torch.tensor([count]).to(dtype))
    assert torch.equal(y[:count], moe_reference(*given, DRAWN.l1, DRAWN.l2))
    assert not y[count:].any()
    assert len(cuda.launches) == 1


@pytest.mark.parametrize(
    ("more", "ids"),
    [
        ({}, [0, 0, 2, 2, 2, 3]),
        ({"align": 4}, [0, 0, -1, -1, 2, 2, 2, -1, 3]),
        ({"rows_apart": 3}, [0, 0, -1, -1, -1, -1, 2, 2, 2, 3]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_by_expert_get_their_ids_on_the_device(monkeypatch, more: dict, ids: list[int], dtype: torch.dtype):
    cuda = Cuda(monkeypatch)
    buffer = SymmBuffer(MoEShape(256, 128, 4, 1), 128, HERE)
    buffer.topk_idx.fill_(1)
    run(buffer, expert_rows=torch.tensor([2, 0, 3, 1], dtype=dtype), **more)
    assert buffer.topk_idx[:ROWS, 0].tolist() == ids + [-1] * (ROWS - len(ids))
    assert (buffer.topk_idx[ROWS:] == 1).all(), "rows that are no part of the call are left alone"
    assert len(cuda.launches) == 1
    run(buffer, expert_rows=torch.zeros(4, dtype=dtype), **more)
    assert (buffer.topk_idx[:ROWS] == -1).all()


def test_what_does_not_fit_is_refused_and_nothing_is_launched(cuda: Cuda):
    buffer, one = SymmBuffer(SHAPE, 128, HERE), torch.ones(1, dtype=torch.int32)
    four = torch.ones(4, dtype=torch.int32)
    for more, says in (
        ({}, "allowed: one of them"),
        ({"num_rows": one, "expert_rows": four}, "allowed: one of them"),
        ({"num_rows": one.float()}, "num_rows has dtype torch.float32; allowed: int32, uint32 or int64"),
        ({"num_rows": four}, "num_rows has shape (4,); allowed: (1,)"),
        ({"num_rows": one.to("meta")}, "num_rows is on meta; allowed: cpu"),
        ({"expert_rows": four}, "num_topk = 2 is not supported; allowed: 1, where rows are grouped by expert"),
        ({"num_rows": one, "activation_clamp": -1.0}, "activation_clamp = -1.0 is not supported"),
    ):
        refused(lambda given=more: run(buffer, **given), says)
    refused(lambda: mm.mega_moe_local_experts(torch.empty(129, 256), L1, L2, buffer, num_rows=one), "rows of y = 129")
    grouped = SymmBuffer(MoEShape(256, 128, 4, 1), 128, HERE)
    refused(lambda: run(grouped, expert_rows=four, align=0), "align = 0 is not supported; allowed: 1 to")
    refused(lambda: run(grouped, expert_rows=four, rows_apart=0), "rows_apart = 0 is not supported")
    shared = SymmBuffer(MoEShape(256, 128, 3, 2, 1), 128, HERE)
    refused(lambda: run(shared, num_rows=one), "1 shared expert; allowed: one of one rank, without shared experts")
    assert cuda.launches == []
