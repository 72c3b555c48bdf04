"""What a layer does with a batch of any size: bring it to the kernel in as many launches as the buffer needs."""

from __future__ import annotations

import torch

from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_shared_weight, check_tensor
from megamoe_jit._layer.from_bf16 import run_batch
from megamoe_jit._layer.given_weights import WeightTensors, format_of_call
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._spec import MAX_TOKENS, check_clamp


def serve(
    buffer: SymmBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1: WeightTensors,
    l2: WeightTensors,
    clamp: float | None,
    fast_math: bool,
    shared_weight: float = 1.0,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a layer on a batch of any size: in chunks of the buffer's capacity, with the bits of one call.

    Returns:
        `y`, or a new tensor bf16 ``[T, hidden]``.

    Raises:
        MegaMoeError: as `MegaMoE.forward`.
    """
    raw = RawInputs(x, topk_idx, topk_weights, buffer.hidden, buffer.num_topk, buffer.device)
    tokens, capacity = raw.tokens, buffer.num_max_tokens_per_rank
    if y is not None:
        check_tensor("y", y, torch.bfloat16, (tokens, buffer.hidden), buffer.device)
    if type(shared_weight) is not float or shared_weight != 1.0:
        check_shared_weight(shared_weight, buffer.num_shared_experts)
    weights, bound, numeric = (l1, l2), check_clamp("activation_clamp", clamp), (fast_math,)
    if tokens <= capacity:
        return run_batch(buffer, raw, weights, bound, numeric, y, shared_weight=shared_weight)
    buffer.require_usable()
    if y is None:
        y = torch.empty(tokens, buffer.hidden, dtype=torch.bfloat16, device=buffer.device)
    choice, _ = buffer.kernels.choose(min(tokens, MAX_TOKENS), None, None, format_of_call(l1))
    variant = choice.variant.value  # of all chunks
    with buffer.lock:  # another thread's batch comes after this one
        for begin in range(0, tokens, capacity):
            part = slice(begin, begin + capacity)
            raw = buffer.read_inputs(x[part], topk_idx[part], topk_weights[part])
            run_batch(buffer, raw, weights, bound, numeric, y[part], variant=variant, shared_weight=shared_weight)
    return y
