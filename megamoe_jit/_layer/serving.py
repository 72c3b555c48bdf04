"""What a layer does with a batch of any size: bring it to the kernel in as many launches as the buffer needs."""

from __future__ import annotations

import torch

from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._layer.weights import WeightPair
from megamoe_jit._spec import MAX_TOKENS

__all__ = ["serve"]


def serve(
    buffer: SymmBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1: WeightPair,
    l2: WeightPair,
    clamp: float | None,
    fast_math: bool,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a layer on a batch of any size: in chunks of the buffer's capacity, with the bits of one call.

    Returns:
        `y`, or a new tensor bf16 ``[T, hidden]``.

    Raises:
        MegaMoeError: as `MegaMoE.forward`.
    """
    capacity = buffer.num_max_tokens_per_rank
    try:
        fits = not (x.ndim == 2 and x.shape[0] > capacity)
    except (AttributeError, RuntimeError):  # it is no dense tensor, and is refused for that
        fits = True
    if fits:
        return mega_moe_from_bf16(
            *(x, topk_idx, topk_weights, l1, l2, buffer), y=y, activation_clamp=clamp, fast_math=fast_math
        )
    buffer.require_usable()
    tokens = RawInputs(x, topk_idx, topk_weights, buffer.hidden, buffer.num_topk, buffer.device).tokens
    if y is None:
        y = torch.empty(tokens, buffer.hidden, dtype=torch.bfloat16, device=buffer.device)
    else:
        check_tensor("y", y, torch.bfloat16, (tokens, buffer.hidden), buffer.device)
    choice, _ = buffer.kernels.choose(min(tokens, MAX_TOKENS), None, None)
    options = {"activation_clamp": clamp, "fast_math": fast_math, "variant": choice.variant.value}  # of all chunks
    with buffer.lock:  # another thread's batch comes after this one
        for begin in range(0, tokens, capacity):
            part = slice(begin, begin + capacity)
            batch = x[part], topk_idx[part], topk_weights[part]
            mega_moe_from_bf16(*batch, l1, l2, buffer, y=y[part], **options)  # type: ignore[arg-type]
    return y
