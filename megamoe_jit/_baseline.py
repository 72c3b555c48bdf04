"""The same layer unfused, of public parts alone: what the fused kernel is compared with.

Sort by expert, NCCL all-to-all of codes, scales and ids, two grouped GEMMs of torch (or of DeepGEMM, if it is
installed), SwiGLU and quantisation, NCCL all-to-all back, weighted combine; one rank leaves the exchanges out.  What
favours the baseline: row counts are exchanged before the timing, so that nothing waits for the host, and all of it is
captured in one CUDA graph where that works.  Each (token, slot) pair travels as a row of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megamoe_jit._quant import (
    AMAX_FLOOR,
    E4M3_MAX,
    dequantize_activations,
    dequantize_weights,
    quantize_activations,
)
from megamoe_jit._ranks import gather, group_rank, group_size
from megamoe_jit._scenarios import Inputs
from megamoe_jit._spec import BLOCK
from megamoe_jit._weights import WeightPair
from megamoe_jit.reference import swiglu

__all__ = ["METHODS", "Baseline", "Gemm", "probe"]

_any: Any = torch  # private operators of torch have no types


def _rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one scale for each row of the last dimension."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=AMAX_FLOOR) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


class Gemm:
    """A way to multiply each expert's rows by its matrix; made once per weight tensor."""

    name = ""
    bound = 0.0  #: `calc_diff` to the FP32 reference that its numerics allow
    row_step = 16  #: an expert's rows are padded to a multiple of this

    def __init__(self, weights: WeightPair, ends: Sequence[int]) -> None:
        """Take weights ``[E, N, K]`` with 128 x 128 scales; expert e has rows ``ends[e - 1]`` to ``ends[e]``."""
        self.begins, self.ends = [0, *ends[:-1]], list(ends)

    @staticmethod
    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[n, K]`` and scales ``[n, S]`` of rows, as this multiplication wants them."""
        return quantize_activations(x)

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Rows bfloat16 ``[P, N]``."""
        raise NotImplementedError


class DeepGemmGrouped(Gemm):
    """DeepGEMM's grouped product over contiguous rows, with the layer's own scales; only if it is installed."""

    name = "DeepGEMM grouped, block scales"
    bound = 1e-3
    row_step = 128

    def __init__(self, weights: WeightPair, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        self.weights = weights
        rows = torch.tensor([end - begin for begin, end in zip(self.begins, self.ends, strict=True)])
        owners = torch.arange(len(self.ends), dtype=torch.int32).repeat_interleave(rows)
        self.owners = owners.to(weights[0].device)
        library: Any = importlib.import_module("deep_gemm")
        self.multiply = library.m_grouped_fp8_gemm_nt_contiguous

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out = torch.empty(codes.shape[0], self.weights[0].shape[1], dtype=torch.bfloat16, device=codes.device)
        self.multiply((codes, scales), self.weights, out, self.owners)
        return out


class GroupedRowwise(Gemm):
    """One `torch._scaled_grouped_mm` for all experts; a scale per row of activations and of weights."""

    name = "scaled_grouped_mm, row-wise scales"
    bound = 1e-2  #: weights and inputs are quantised a second time, with coarser scales

    def __init__(self, weights: WeightPair, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        codes, scales = weights
        self.codes = torch.empty_like(codes)
        self.scales = torch.empty(codes.shape[:2], dtype=torch.float32, device=codes.device)
        for e in range(codes.shape[0]):
            self.codes[e], scale = _rowwise(dequantize_weights(codes[e], scales[e]))
            self.scales[e] = scale[:, 0]
        self.offsets = torch.tensor(self.ends, dtype=torch.int32, device=codes.device)

    @staticmethod
    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _rowwise(x)

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _any._scaled_grouped_mm(
            codes,
            self.codes.transpose(-2, -1),
            scales.view(-1),
            self.scales,
            offs=self.offsets,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return result


class BlockwiseEach(Gemm):
    """One `torch._scaled_mm` for each expert, with the layer's own 1 x 128 and 128 x 128 scales."""

    name = "scaled_mm per expert, block scales"
    bound = 1e-3

    def __init__(self, weights: WeightPair, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        self.codes, scales = weights
        blocks = scales.shape[2]
        padded = torch.zeros(*scales.shape[:2], -(-blocks // 4) * 4, device=scales.device)  # cuBLAS wants rows of 16 B
        padded[..., :blocks] = scales
        self.scales = padded[..., :blocks]
        self.blocks = blocks
        places = []  # the scales of an expert's rows must lie together, block by block
        for begin, end in zip(self.begins, self.ends, strict=True):
            row = torch.arange(begin, end, device=scales.device)
            places.append((row[None, :] * blocks + torch.arange(blocks, device=scales.device)[:, None]).view(-1))
        self.places = torch.cat(places)

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out = torch.empty(codes.shape[0], self.codes.shape[1], dtype=torch.bfloat16, device=codes.device)
        moved = scales.reshape(-1)[self.places]
        for e, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            if begin == end:
                continue
            mine = moved[begin * self.blocks : end * self.blocks].view(self.blocks, end - begin)
            _any._scaled_mm(
                codes[begin:end],
                self.codes[e].t(),
                scale_a=mine.t(),
                scale_b=self.scales[e].t(),
                out_dtype=torch.bfloat16,
                out=out[begin:end],
            )
        return out


class Dequantised(Gemm):
    """One bf16 product for each expert, its weights dequantised beforehand; the last resort."""

    name = "bf16 matmul per expert, weights dequantised"
    bound = 1e-3

    def __init__(self, weights: WeightPair, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        codes, scales = weights
        self.matrices = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
        for e in range(codes.shape[0]):
            self.matrices[e] = dequantize_weights(codes[e], scales[e])

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows = dequantize_activations(codes, scales).to(torch.bfloat16)
        out = torch.empty(codes.shape[0], self.matrices.shape[1], dtype=torch.bfloat16, device=codes.device)
        for e, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            if begin < end:
                torch.mm(rows[begin:end], self.matrices[e].t(), out=out[begin:end])
        return out


METHODS: tuple[type[Gemm], ...] = (DeepGemmGrouped, GroupedRowwise, BlockwiseEach, Dequantised)


def probe(method: type[Gemm], device: torch.device) -> str:
    """Why a method does not work with this torch and GPU; empty if it does, and gives what it should."""
    gen = torch.Generator(device=device).manual_seed(0)
    n, k, step = 256, 512, method.row_step
    ends = (2 * step, 2 * step, 5 * step)
    codes = torch.randn(3, n, k, generator=gen, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(3, n // BLOCK, k // BLOCK, generator=gen, device=device) + 0.5
    x = torch.randn(ends[-1], k, generator=gen, device=device)
    try:
        got = method((codes, scales), ends)(*method.quantise(x)).float()
    except ImportError as error:
        return f"{error.name or 'a package it needs'} is not installed"
    except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    exact = torch.empty_like(got)
    for e, (begin, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        exact[begin:end] = x[begin:end] @ dequantize_weights(codes[e], scales[e]).T
    error_ratio = float((got - exact).norm() / exact.norm())
    return "" if error_ratio < 0.1 else f"wrong results (relative error {error_ratio:.2g})"


def _activate(gate_up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return swiglu(gate, up, clamp)


def _combine(rows: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tokens, topk = weights.shape
    slots = rows[where].view(tokens, topk, rows.shape[1]).float()
    return (slots * weights[..., None]).sum(dim=1).to(torch.bfloat16)


@dataclass(frozen=True)
class _Plan:
    """Row counts, exchanged before the timing."""

    sent: list[int]  #: rows to each rank
    received: list[int]  #: rows from each rank
    ends: list[int]  #: one past the last padded row of each local expert
    first: torch.Tensor  #: of each local expert, among the received rows in order
    first_padded: torch.Tensor  #: the same, padded


def _make_plan(ids: torch.Tensor, experts: int, group: Any, row_step: int) -> _Plan:
    rank, ranks = group_rank(group), group_size(group)
    local = experts // ranks
    everyone = gather(group, torch.bincount(ids.reshape(-1), minlength=experts).tolist())
    counts = torch.tensor(everyone).view(ranks, ranks, local)  # from, to, expert
    mine = counts[:, rank].sum(dim=0)
    padded = -(-mine // row_step) * row_step
    ends = padded.cumsum(0)
    return _Plan(
        counts[rank].sum(dim=1).tolist(),
        counts[:, rank].sum(dim=1).tolist(),
        ends.tolist(),
        (mine.cumsum(0) - mine).to(ids.device),
        (ends - padded).to(ids.device),
    )


class Baseline:
    """One rank's part of the unfused layer for fixed inputs; every rank makes and calls it together.

    Args:
        method: how the experts' rows are multiplied.
        inputs: this rank's tokens; no slot is masked.
        l1, l2: weights of this rank's experts, as a checkpoint has them.
        experts: of all ranks.
        clamp: of the activation.
        group: the process group; None for one rank.
        compiled: fuse SwiGLU, quantisation and combine with torch.compile.
    """

    def __init__(
        self,
        method: type[Gemm],
        inputs: Inputs,
        l1: WeightPair,
        l2: WeightPair,
        experts: int,
        clamp: float | None,
        group: Any,
        compiled: bool = True,
    ) -> None:
        self.method, self.group, self.local = method, group, experts // group_size(group)
        self.rank = group_rank(group)
        self.plan = _make_plan(inputs.topk_idx, experts, group, method.row_step)
        self.first, self.second = method(l1, self.plan.ends), method(l2, self.plan.ends)
        exact = method.quantise is Gemm.quantise
        self.codes, self.scales = (inputs.x_q, inputs.x_sf) if exact else method.quantise(inputs.x.float())
        self.ids, self.weights = inputs.topk_idx, inputs.topk_weights
        tokens, hidden = self.codes.shape
        width = hidden + self.scales.shape[1] * 4
        device, rows = self.codes.device, sum(self.plan.received)
        self.received = torch.empty(rows, width, dtype=torch.uint8, device=device)
        self.received_ids = torch.empty(rows, dtype=torch.int64, device=device)
        self.returned = torch.empty(self.ids.numel(), hidden, dtype=torch.bfloat16, device=device)
        padded = self.plan.ends[-1]
        self.rows = torch.zeros(padded, hidden, dtype=torch.uint8, device=device).view(self.codes.dtype)
        self.row_scales = torch.zeros(padded, self.scales.shape[1], dtype=torch.float32, device=device)

        def act(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return method.quantise(_activate(gate_up, clamp))

        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._act: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = wrap(act)
        self._combine: Callable[..., torch.Tensor] = wrap(_combine)

    def _exchange(self, out: torch.Tensor, rows: torch.Tensor, into: list[int], of: list[int]) -> torch.Tensor:
        """Rows from all ranks, in `out`; with one rank the rows themselves."""
        if group_size(self.group) == 1:
            return rows
        import torch.distributed as dist

        dist.all_to_all_single(out, rows, into, of, group=self.group)
        return out

    def __call__(self) -> torch.Tensor:
        """Output bfloat16 ``[T, H]``."""
        plan, hidden, topk = self.plan, self.codes.shape[1], self.ids.shape[1]
        ids, order = self.ids.reshape(-1).sort(stable=True)
        tokens = torch.cat((self.codes.view(torch.uint8), self.scales.view(torch.uint8)), dim=1)
        send = tokens[torch.div(order, topk, rounding_mode="floor")]
        received = self._exchange(self.received, send, plan.received, plan.sent)
        received_ids = self._exchange(self.received_ids, ids, plan.received, plan.sent)
        expert, arrival = (received_ids - self.rank * self.local).sort(stable=True)
        place = torch.arange(expert.numel(), device=expert.device) + (plan.first_padded - plan.first)[expert]
        sorted_rows = received[arrival]
        self.rows.view(torch.uint8)[place] = sorted_rows[:, :hidden]
        self.row_scales[place] = sorted_rows[:, hidden:].contiguous().view(torch.float32)
        results = self.second(*self._act(self.first(self.rows, self.row_scales)))
        where = torch.empty_like(place)
        where[arrival] = place
        returned = self._exchange(self.returned, results[where], plan.sent, plan.received)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return self._combine(returned, back, self.weights)
