"""Rows by DeepEP 2, through the class of its release: what its library is asked in a call, and what that gives back.

The library is a stand-in for one rank: every row arrives where it is, followed by as many as could have come.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe_jit._nodes.deep_ep import TESTED, DeepEpExchange
from megamoe_jit._nodes.exchange import Batch
from megamoe_jit._nodes.memory import staging
from megamoe_jit._spec import MoEShape
from tests.engines.sources import RealSources

SHAPE, RANKS, ROWS, TOKENS = MoEShape(256, 128, 8, 2), 2, 6, 4
REAL = ("deep_ep.buffers.elastic",) + tuple(f"deep_ep.utils.{name}" for name in ("math", "semantic", "event"))


class Library:
    """`deep_ep._C` as far as a call goes; arguments are by place there."""

    def dispatch(self, x: Any, sf: Any, topk_idx: Any, topk_weights: Any, *more: Any) -> tuple[Any, ...]:
        most, experts, do_cpu_sync, do_expand = more[11], more[12], more[-4], more[-3]
        assert (x.dtype, sf.shape[1], experts, do_expand) == (torch.float8_e4m3fn, 2, SHAPE.experts, False)
        assert len(x) == TOKENS <= most == ROWS
        rows = TOKENS if do_cpu_sync else RANKS * most
        arrived = [torch.zeros(rows, *given.shape[1:], dtype=given.dtype) for given in (x, sf, topk_idx, topk_weights)]
        for there, given in zip(arrived, (x, sf, topk_idx, topk_weights), strict=True):
            there.view(torch.uint8)[:TOKENS] = given.view(torch.uint8)
        count = torch.tensor([0, TOKENS], dtype=torch.int32)
        return *arrived, topk_idx, TOKENS, TOKENS, [], count, *[None] * 6, None

    def combine(self, x: Any, topk_weights: Any, *more: Any) -> tuple[Any, ...]:
        assert (x.dtype, topk_weights) == (torch.bfloat16, None)
        assert more[4].tolist() == [0, TOKENS], "the handle of that dispatch"
        return x[:TOKENS], None, None


@pytest.fixture(params=TESTED)
def buffer(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    """The release's `ElasticBuffer`, made without a GPU."""
    with RealSources(folder / f"sgl-deep-ep-{request.param}", "deep_ep", REAL):
        real = importlib.import_module("deep_ep.buffers.elastic").ElasticBuffer
        made = type("Made", (real,), {"__init__": lambda self: None, "get_theoretical_num_sms": lambda *_: 8})()
        made.num_ranks, made.num_allocated_qps, made.num_max_tokens_per_rank = RANKS, 17, ROWS
        made.allow_hybrid_mode = made.deterministic = made.explicitly_destroy = False
        made.runtime = Library()
        yield made


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_is_what_the_release_takes(buffer: Any, waits: bool):
    exchange = DeepEpExchange(buffer, wait_for_counts=waits)
    here = torch.device("cpu")
    rows, into = staging(SHAPE, ROWS, here), staging(SHAPE, exchange.most_rows(ROWS), here)
    rows.topk_idx[:TOKENS] = 3
    rows.x_sf[:TOKENS] = 0.5
    arrived = exchange.dispatch(Batch(rows, TOKENS), into, 0, SHAPE.experts // RANKS)
    assert arrived.rows == (TOKENS if waits else RANKS * ROWS)
    assert (arrived.num_rows is None) is waits
    assert waits or arrived.num_rows.tolist() == [TOKENS]
    for there, given in zip(into.tensors, rows.tensors, strict=True):
        assert torch.equal(there[:TOKENS].view(torch.uint8), given[:TOKENS].view(torch.uint8))
    partial, y = torch.randn(arrived.rows, SHAPE.hidden).bfloat16(), torch.empty(TOKENS, SHAPE.hidden).bfloat16()
    exchange.combine(arrived, partial, y)
    assert torch.equal(y, partial[:TOKENS])
