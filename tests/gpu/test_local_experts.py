"""`mega_moe_local_experts` on the GPU: counts that the device alone knows, in graphs too, and garbage behind them."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._check.verify import judge
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import moe_reference

ROWS, EXPERTS = 300, 8


def layer(device, topk):
    shape = MoEShape(512, 512, EXPERTS, topk)
    weights = make_weights(shape, device)
    pairs = [tuple(t.clone() for t in pair) for pair in (weights.l1, weights.l2)]
    buffer = mm.get_symm_buffer_for_mega_moe(None, EXPERTS, ROWS, topk, 512, 512, device=device)
    return weights, mm.transform_weights_for_mega_moe_sm90(*pairs), buffer


def fill(buffer, rows):
    """Rows, and behind them NaN that names experts."""
    buffer.x.view(torch.uint8).fill_(0x7F)
    buffer.x_sf.fill_(float("nan"))
    buffer.topk_weights.fill_(float("nan"))
    buffer.topk_idx.fill_(1)
    codes, scales = mm.quantize_activations(torch.randn(rows, 512, device=buffer.device))
    buffer.x[:rows].copy_(codes)
    buffer.x_sf[:rows].copy_(scales)
    buffer.topk_weights[:rows].copy_(torch.rand(rows, buffer.num_topk, device=buffer.device) + 0.1)
    buffer.topk_idx[:rows].copy_(torch.randint(-1, EXPERTS, (rows, buffer.num_topk), device=buffer.device))


def expected(buffer, weights, rows):
    views = (view[:rows].clone() for view in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights))
    return moe_reference(*views, weights.l1, weights.l2)


@pytest.mark.parametrize("replayed", [False, True])
def test_rows_past_the_count_are_zeros(device, replayed):
    weights, (l1, l2), buffer = layer(device, 2)
    y, count = (
        torch.empty(ROWS, 512, dtype=torch.bfloat16, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )

    def run():
        mm.mega_moe_local_experts(y, l1, l2, buffer, num_rows=count)

    run()
    buffer.check()
    if replayed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    for rows in (0, 1, 131, ROWS, 7):
        fill(buffer, rows)
        wanted = expected(buffer, weights, rows)
        count.fill_(rows)
        y.fill_(float("nan"))
        run()
        buffer.check()
        assert judge(y[:rows], wanted).passed
        assert not y[rows:].any()
    buffer.destroy()


@pytest.mark.parametrize("more", [{}, {"align": 16}, {"rows_apart": 36}])
def test_rows_by_expert(device, more):
    weights, (l1, l2), buffer = layer(device, 1)
    counts = torch.tensor([5, 0, 33, 1, 0, 0, 20, 9], dtype=torch.int32, device=device)
    fill(buffer, ROWS)
    y = torch.empty(ROWS, 512, dtype=torch.bfloat16, device=device)
    mm.mega_moe_local_experts(y, l1, l2, buffer, expert_rows=counts, **more)
    buffer.check()
    first = 0
    for expert, rows in enumerate(counts.tolist()):
        ids = buffer.topk_idx[first : first + rows, 0]
        assert (ids == expert).all()
        step = more.get("align", 1)
        first += more.get("rows_apart", -(-rows // step) * step)
    assert int((buffer.topk_idx[:ROWS] >= 0).sum()) == int(counts.sum())
    assert judge(y, expected(buffer, weights, ROWS)).passed
    buffer.destroy()
