"""What lies between the products of others, as Triton kernels: SwiGLU with a clamp, and the sum over a token's experts.

Engines have kernels of their own for these; all of them, and these, run at memory speed. Kernels have no annotations:
Triton takes them for types of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu(gated, out, width, clamp, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gated + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(gated + row * 2 * width + width + column, mask=inside).to(tl.float32)
    gate = tl.minimum(gate, clamp)
    up = tl.minimum(tl.maximum(up, -clamp), clamp)
    tl.store(out + row * width + column, (gate / (1 + tl.exp(-gate)) * up).to(tl.bfloat16), mask=inside)


def swiglu_into(out: torch.Tensor, gated: torch.Tensor, clamp: float) -> torch.Tensor:
    """``silu(min(gate, clamp)) * clamp(up, -clamp, clamp)`` in FP32.

    Args:
        out: bfloat16 ``[R, I]``.
        gated: bfloat16 ``[R, 2I]``, gate first.
        clamp: of both.
    """
    rows, width = out.shape
    _swiglu[(rows, triton.cdiv(width, BLOCK))](gated, out, width, clamp, BLOCK=BLOCK)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_sum(  # type: ignore[no-untyped-def]  # noqa: ANN202
    slots,  # noqa: ANN001
    weights,  # noqa: ANN001
    out,  # noqa: ANN001
    width,  # noqa: ANN001
    TOPK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOPK):
        value = tl.load(slots + (row * TOPK + slot) * width + column, mask=inside).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + row * TOPK + slot)
        total += value
    tl.store(out + row * width + column, total.to(tl.bfloat16), mask=inside)


def weighted_sum_into(out: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The sum over each token's slots, in FP32.

    Args:
        out: bfloat16 ``[T, H]``.
        slots: bfloat16 ``[T * K, H]``.
        weights: float32 ``[T, K]``; None if the slots are weighted already.
    """
    tokens, width = out.shape
    grid = (tokens, triton.cdiv(width, BLOCK))
    topk = slots.shape[0] // tokens
    _weighted_sum[grid](slots, weights, out, width, TOPK=topk, WEIGHTED=weights is not None, BLOCK=BLOCK)
    return out
