"""What a layer does with a batch: check it, and bring it to the kernel in as many launches as the buffer needs."""

from __future__ import annotations

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.calls import fp8_mega_moe
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.quantize import quantize_activations, require_tensor
from megamoe_jit._layer.weights import WeightPair
from megamoe_jit._spec import MAX_TOKENS

__all__ = ["FLOATING", "FLOATS", "check_batch", "serve", "stage"]

FLOATS, FLOATING = (torch.bfloat16, torch.float16, torch.float32), "bfloat16, float16 or float32"
_INTEGERS = torch.int64, torch.int32


def check_batch(buffer: SymmBuffer, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> int:
    """The number of tokens; raises unless the buffer is usable and these are the inputs of one layer on it."""
    buffer.require_usable()
    require_tensor("x", x)
    hidden, topk = buffer.hidden, buffer.num_topk
    if x.ndim != 2:
        raise ConfigError(f"x has shape {tuple(x.shape)}; allowed: [tokens, {hidden}]")
    tokens = x.shape[0]
    for name, tensor, width, floating in (
        ("x", x, hidden, True),
        ("topk_idx", topk_idx, topk, False),
        ("topk_weights", topk_weights, topk, True),
    ):
        require_tensor(name, tensor)
        if tensor.shape != (tokens, width):
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: {(tokens, width)}")
        if tensor.dtype not in (FLOATS if floating else _INTEGERS):
            allowed = FLOATING if floating else "int64 or int32"
            raise ConfigError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")
        if tensor.device != buffer.device:
            raise ConfigError(f"{name} is on {tensor.device}; allowed: {buffer.device}, where the layer is")
    return tokens


@torch.no_grad()  # a copy that is recorded makes the buffer's views parts of a graph that grows with every call
def stage(buffer: SymmBuffer, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Quantise and copy a checked batch into the buffer, once the last call has read its own."""
    tokens = x.shape[0]
    buffer.wait_for_last()
    codes, scales = quantize_activations(x)
    buffer.x[:tokens].copy_(codes)
    buffer.x_sf[:tokens].copy_(scales)
    buffer.topk_idx[:tokens].copy_(topk_idx)
    buffer.topk_weights[:tokens].copy_(topk_weights)


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
        return _launch(buffer, x, topk_idx, topk_weights, l1, l2, clamp, fast_math, y)
    tokens = check_batch(buffer, x, topk_idx, topk_weights)
    y = _output(buffer, tokens, y)
    choice, _ = buffer.choose(min(tokens, MAX_TOKENS), None, None)  # one kernel for all chunks
    with buffer.lock:  # another thread's batch comes after this one
        for begin in range(0, tokens, capacity):
            part = slice(begin, begin + capacity)
            batch = x[part], topk_idx[part], topk_weights[part]
            _launch(buffer, *batch, l1, l2, clamp, fast_math, y[part], choice.variant.value)
    return y


def _output(buffer: SymmBuffer, tokens: int, y: torch.Tensor | None) -> torch.Tensor:
    if y is None:
        return torch.empty(tokens, buffer.hidden, dtype=torch.bfloat16, device=buffer.device)
    check_tensor("y", y, torch.bfloat16, (tokens, buffer.hidden), buffer.device)
    return y


def _launch(
    buffer: SymmBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1: WeightPair,
    l2: WeightPair,
    clamp: float | None,
    fast_math: bool,
    y: torch.Tensor | None = None,
    variant: str | None = None,
) -> torch.Tensor:
    """One launch, of at most as many tokens as the buffer holds: the one place where a layer calls the kernel."""
    y = _output(buffer, check_batch(buffer, x, topk_idx, topk_weights), y)
    with buffer.lock:  # another thread's inputs come after this call
        stage(buffer, x, topk_idx, topk_weights)
        fp8_mega_moe(y, l1, l2, buffer, activation_clamp=clamp, fast_math=fast_math, variant=variant)
    return y
