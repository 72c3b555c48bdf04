"""The MoE layer in plain FP32 PyTorch, with the kernel's numerics; runs on any device.

Per (token, slot) of the router's top-k::

    g, u = x @ w13[e].T                       FP32
    h    = silu(min(g, c)) * clamp(u, -c, c)  FP32
    h    = e4m3 codes, one scale per 128 columns
    o    = bf16(h @ w2[e].T)
    y   += weight * o                         FP32, in slot order; bf16 at the end

Slots with expert -1 contribute nothing, whatever their weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megamoe_jit._layer.quantize import (
    dequantize_activations,
    dequantize_weights,
    quantize_activations,
)
from megamoe_jit._layer.weights import WeightPair

__all__ = ["calc_diff", "expert_counts", "moe_reference", "row_diffs", "swiglu"]

_CHUNK = 8192  #: rows of one expert worked on at once; bounds the scratch of a hot expert


@contextmanager
def _full_fp32_matmul() -> Iterator[None]:
    """No TF32 inside; puts back whatever the caller had set."""
    matmul = torch.backends.cuda.matmul
    flag, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    saved = getattr(matmul, flag)
    setattr(matmul, flag, exact)
    try:
        yield
    finally:
        setattr(matmul, flag, saved)


def swiglu(gate: torch.Tensor, up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """``silu(min(gate, clamp)) * clamp(up, -clamp, clamp)``; float32 ``[n, I]`` each, NaN stays NaN."""
    if clamp is not None:
        gate = gate.clamp(max=clamp)
        up = up.clamp(min=-clamp, max=clamp)
    return torch.nn.functional.silu(gate) * up


def expert_counts(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Rows each expert receives.

    Args:
        topk_idx: int64 ``[T, K]``; negative is masked, an expert may appear twice in a row.
        num_experts: Number of experts.

    Returns:
        int32 ``[num_experts]``.
    """
    flat = topk_idx.reshape(-1)
    return torch.bincount(flat[flat >= 0], minlength=num_experts).to(torch.int32)


def _expert(
    x: torch.Tensor, l1: WeightPair, l2: WeightPair, expert: int, clamp: float | None, requantize: bool
) -> torch.Tensor:
    """Output float32 ``[n, H]`` of one expert for rows float32 ``[n, H]``."""
    w13 = dequantize_weights(l1[0][expert], l1[1][expert])
    w2 = dequantize_weights(l2[0][expert], l2[1][expert])
    out = torch.empty_like(x)
    for begin in range(0, x.shape[0], _CHUNK):
        gate, up = (x[begin : begin + _CHUNK] @ w13.T).chunk(2, dim=-1)
        h = swiglu(gate, up, clamp)
        if requantize:
            h = dequantize_activations(*quantize_activations(h))
        out[begin : begin + _CHUNK] = h @ w2.T
    return out


def moe_reference(
    x: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1: WeightPair,
    l2: WeightPair,
    *,
    activation_clamp: float | None = None,
    requantize: bool = True,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """One MoE layer, expert by expert.

    Args:
        x: float8_e4m3fn ``[T, H]``.
        x_sf: float32 ``[T, H / 128]``.
        topk_idx: int64 ``[T, K]``, -1 for a masked slot.
        topk_weights: float32 ``[T, K]``.
        l1: ``w13`` float8_e4m3fn ``[E, 2I, H]``, gate rows first (*not* transformed), and scales float32
            ``[E, 2I / 128, H / 128]``.
        l2: ``w2`` float8_e4m3fn ``[E, H, I]`` and scales float32 ``[E, H / 128, I / 128]``.
        activation_clamp: Bound of gate (from above) and of up (both sides); None for no bound.
        requantize: False leaves out both roundings inside the layer, that of the intermediate to e4m3 and
            that of each slot to bf16: the layer in exact FP32 on the same inputs.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` ``[T, H]``; a token whose slots are all masked gives zeros.
    """
    tokens, hidden = x.shape
    topk = topk_idx.shape[1]
    device = x.device
    flat = topk_idx.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat + 1, minlength=l1[0].shape[0] + 1).cumsum(0).tolist()  # [0] ends the masked slots
    slots = torch.zeros(tokens * topk, hidden, dtype=torch.bfloat16 if requantize else torch.float32, device=device)
    with _full_fp32_matmul():
        for expert, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
            if begin == end:
                continue
            where = order[begin:end]
            rows = torch.div(where, topk, rounding_mode="floor")
            codes = x.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
            inputs = dequantize_activations(codes, x_sf[rows])
            slots[where] = _expert(inputs, l1, l2, expert, activation_clamp, requantize).to(slots.dtype)
    slots = slots.view(tokens, topk, hidden)
    weights = torch.where(topk_idx < 0, 0.0, topk_weights.float())
    y = torch.zeros(tokens, hidden, dtype=torch.float32, device=device)
    for slot in range(topk):
        y += weights[:, slot, None] * slots[:, slot].float()
    return y.to(out_dtype)


def row_diffs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`calc_diff` of each pair of rows.

    Args:
        a: ``[T, H]``, any floating dtype.
        b: ``[T, H]``, any floating dtype.

    Returns:
        float64 ``[T]``; 0 where both rows are zero.
    """
    a, b = a.double(), b.double()
    energy = (a * a + b * b).sum(dim=-1)
    similarity = 2.0 * (a * b).sum(dim=-1) / energy
    return torch.where(energy == 0, 0.0, 1.0 - similarity)


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """``1 - 2 * sum(a * b) / sum(a * a + b * b)`` in float64; 0 when both are zero or empty.

    `a` and `b` have the same shape, any one, and any floating dtype.
    """
    return float(row_diffs(a.reshape(1, -1), b.reshape(1, -1)).item())
