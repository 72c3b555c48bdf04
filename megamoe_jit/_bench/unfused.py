"""The same layer unfused, of public parts alone: what the fused kernel is compared with.

Sort by expert, NCCL all-to-all of codes, scales and ids, two grouped GEMMs (see `grouped_gemm`), SwiGLU and
quantisation, NCCL all-to-all back, weighted combine; one rank leaves the exchanges out.  What favours the baseline: row
counts are exchanged before the timing, so that nothing waits for the host, and all of it is captured in one CUDA graph
where that works.  Each (token, slot) pair travels as a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megamoe_jit._bench.grouped_gemm import Gemm
from megamoe_jit._check.scenarios import Inputs, Weights
from megamoe_jit._layer.group import gather, group_rank, group_size
from megamoe_jit.reference import activate


@dataclass(frozen=True, slots=True)
class Task:
    """What every contender does: a layer with fixed inputs, none of their slots masked.

    Attributes:
        inputs: this rank's tokens.
        own: weights of this rank's experts, as a checkpoint has them.
        experts: of all ranks.
        clamp: of the activation.
        group: the process group; None for one rank.
    """

    inputs: Inputs
    own: Weights
    experts: int
    clamp: float | None
    group: Any = None


def _activate(gate_up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return activate(gate, up, clamp)


def _combine(rows: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tokens, topk = weights.shape
    slots = rows[where].view(tokens, topk, rows.shape[1]).float()
    return (slots * weights[..., None]).sum(dim=1).to(torch.bfloat16)


@dataclass(frozen=True)
class _Exchange:
    """Row counts, exchanged before the timing."""

    sent: list[int]  #: rows to each rank
    received: list[int]  #: rows from each rank
    ends: list[int]  #: one past the last padded row of each local expert
    first: torch.Tensor  #: of each local expert, among the received rows in order
    first_padded: torch.Tensor  #: the same, padded


def _make_exchange(ids: torch.Tensor, experts: int, group: Any, row_step: int) -> _Exchange:
    rank, ranks = group_rank(group), group_size(group)
    local = experts // ranks
    everyone = gather(group, torch.bincount(ids.reshape(-1), minlength=experts).tolist())
    counts = torch.tensor(everyone, dtype=torch.int64, device="cpu").view(ranks, ranks, local)  # from, to, expert
    mine = counts[:, rank].sum(dim=0)
    padded = -(-mine // row_step) * row_step
    ends = padded.cumsum(0)
    return _Exchange(
        counts[rank].sum(dim=1).tolist(),
        counts[:, rank].sum(dim=1).tolist(),
        ends.tolist(),
        (mine.cumsum(0) - mine).to(ids.device),
        (ends - padded).to(ids.device),
    )


class Baseline:
    """One rank's part of the unfused layer; every rank makes and calls it together.

    Args:
        method: how the experts' rows are multiplied.
        task: what is to be done.
        compiled: fuse SwiGLU, quantisation and combine with torch.compile.
    """

    def __init__(self, method: type[Gemm], task: Task, compiled: bool = True) -> None:
        inputs, experts, group, clamp = task.inputs, task.experts, task.group, task.clamp
        self.method, self.group, self.local = method, group, experts // group_size(group)
        self.rank = group_rank(group)
        self.exchange = _make_exchange(inputs.topk_idx, experts, group, method.row_step)
        self.first, self.second = (method(each, self.exchange.ends) for each in (task.own.l1, task.own.l2))
        exact = method.quantise is Gemm.quantise
        self.codes, self.scales = (inputs.x_q, inputs.x_sf) if exact else method.quantise(inputs.x.float())
        self.ids, self.weights = inputs.topk_idx, inputs.topk_weights
        tokens, hidden = self.codes.shape
        width = hidden + self.scales.shape[1] * 4
        device, rows = self.codes.device, sum(self.exchange.received)
        self.received = torch.empty(rows, width, dtype=torch.uint8, device=device)
        self.received_ids = torch.empty(rows, dtype=torch.int64, device=device)
        self.returned = torch.empty(self.ids.numel(), hidden, dtype=torch.bfloat16, device=device)
        padded = self.exchange.ends[-1]
        self.rows = torch.zeros(padded, hidden, dtype=torch.uint8, device=device).view(self.codes.dtype)
        self.row_scales = torch.zeros(padded, self.scales.shape[1], dtype=torch.float32, device=device)

        def act(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return method.quantise(_activate(gate_up, clamp))

        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._act: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = wrap(act)
        self._combine: Callable[..., torch.Tensor] = wrap(_combine)

    def _all_to_all(self, out: torch.Tensor, rows: torch.Tensor, into: list[int], of: list[int]) -> torch.Tensor:
        """Rows from all ranks, in `out`; with one rank the rows themselves."""
        if group_size(self.group) == 1:
            return rows
        import torch.distributed as dist

        dist.all_to_all_single(out, rows, into, of, group=self.group)
        return out

    def __call__(self) -> torch.Tensor:
        """Output bfloat16 ``[T, H]``."""
        exchange, hidden, topk = self.exchange, self.codes.shape[1], self.ids.shape[1]
        ids, order = self.ids.reshape(-1).sort(stable=True)
        tokens = torch.cat((self.codes.view(torch.uint8), self.scales.view(torch.uint8)), dim=1)
        send = tokens[torch.div(order, topk, rounding_mode="floor")]
        received = self._all_to_all(self.received, send, exchange.received, exchange.sent)
        received_ids = self._all_to_all(self.received_ids, ids, exchange.received, exchange.sent)
        expert, arrival = (received_ids - self.rank * self.local).sort(stable=True)
        place = torch.arange(expert.numel(), dtype=torch.int64, device=expert.device)
        place += (exchange.first_padded - exchange.first)[expert]
        sorted_rows = received[arrival]
        self.rows.view(torch.uint8)[place] = sorted_rows[:, :hidden]
        self.row_scales[place] = sorted_rows[:, hidden:].contiguous().view(torch.float32)
        results = self.second(*self._act(self.first(self.rows, self.row_scales)))
        where = torch.empty_like(place)
        where[arrival] = place
        returned = self._all_to_all(self.returned, results[where], exchange.sent, exchange.received)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
        return self._combine(returned, back, self.weights)
