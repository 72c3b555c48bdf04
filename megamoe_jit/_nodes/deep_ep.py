"""`DeepEpExchange`: rows by DeepEP's `ElasticBuffer` (version 2) to the ranks that have their experts.

Written against its published interface, whose own class takes what is asked here; it has not run. DeepEP sends a row
once to each rank that needs it, with the numbers of that rank's experts, and sums what ranks give for a token in an
order of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._spec.checks import check_flag

TESTED = ("0.1.2.post1",)  #: releases of sgl-deep-ep, DeepEP 2 as SGLang builds it, whose classes take these calls


class DeepEpExchange:
    """An `Exchange` of a `deep_ep.ElasticBuffer`; each rank runs the kernel of its own experts alone.

    Args:
        buffer: made with `use_fp8_dispatch=True`, and with room for the tokens of a call, or of a chunk of one.
        wait_for_counts: have the host wait for the number of rows, and launch on these alone; by default nothing waits,
            and launches are for all rows that could have come, most of them masked.

    Raises:
        ConfigError: it has no `dispatch` or `combine`, or `wait_for_counts` is no bool.
    """

    name = "deep_ep"
    whole_node = False
    float32 = False

    def __init__(self, buffer: Any, *, wait_for_counts: bool = False) -> None:
        if not (callable(getattr(buffer, "dispatch", None)) and callable(getattr(buffer, "combine", None))):
            given = type(buffer).__name__
            raise ConfigError(f"buffer: {given} given; allowed: a deep_ep.ElasticBuffer of DeepEP 2")
        check_flag("wait_for_counts", wait_for_counts)
        self._buffer, self._wait = buffer, wait_for_counts
        self.capturable = not wait_for_counts

    def most_rows(self, tokens: int) -> int:
        return int(self._buffer.num_ranks) * tokens

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        mine, all_experts = batch.rows[: batch.tokens], experts * int(self._buffer.num_ranks)
        ids = torch.where((mine.topk_idx >= 0) & (mine.topk_idx < all_experts), mine.topk_idx, -1)
        (x, x_sf), topk_idx, topk_weights, handle, _ = self._buffer.dispatch(
            (mine.x, mine.x_sf),
            topk_idx=ids,
            topk_weights=mine.topk_weights,
            num_experts=all_experts,
            num_max_tokens_per_rank=len(batch.rows),
            do_cpu_sync=self._wait,
        )
        rows = x.shape[0]
        arriving = into[:rows]
        for there, here in zip(arriving.tensors, (x, x_sf, topk_idx, topk_weights), strict=True):
            there.copy_(here)
        count = None if self._wait else handle.psum_num_recv_tokens_per_scaleup_rank[-1:]
        return Arrived(rows, count, batch, handle)

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        combined, _, _ = self._buffer.combine(partial, handle=arrived.state)
        y.copy_(combined)
