"""The call: `fp8_mega_moe`, and the two forms of it that force a variant."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamoe_jit._buffer import SymmBuffer, sm_count
from megamoe_jit._errors import ConfigError
from megamoe_jit._settings import get_settings
from megamoe_jit._spec import Variant
from megamoe_jit._validate import RECIPE, check_expert_ids, check_recipe, check_tensor, check_weights
from megamoe_jit._weights import WeightPair
from megamoe_jit.heuristics.select import choose

__all__ = ["fp8_mega_moe", "fp8_mega_moe_cooperative", "fp8_mega_moe_pingpong"]


def fp8_mega_moe(
    y: torch.Tensor,
    l1: WeightPair,
    l2: WeightPair,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    recipe: Sequence[int] = RECIPE,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_sms: int | None = None,
    variant: str | None = None,
) -> None:
    """Run one MoE layer on the tokens staged in `sym_buffer`, in one kernel launch on the current stream.

    ``y[t] = sum over slots k of topk_weights[t, k] * down(quantise(swiglu(gate_up(x[t]))))`` with the experts
    ``topk_idx[t, k]``.  Masked slots (-1) add nothing; a token with all slots masked gives zeros.

    Args:
        y: bf16 ``[T, hidden]``, written; T is the number of tokens staged, 0 to the buffer's capacity.
        l1: e4m3 ``[experts, 2 * intermediate, hidden]`` from `transform_weights_for_mega_moe_sm90`, and float32
            ``[experts, 2 * intermediate / 128, hidden / 128]``.
        l2: e4m3 ``[experts, hidden, intermediate]``, and float32 ``[experts, hidden / 128, intermediate / 128]``.
        sym_buffer: the inputs, staged by the caller into its views before each call.
        cumulative_local_expert_recv_stats: int32 ``[local experts]``; rows of each expert are added to it.
        recipe: quantisation blocks; must be (128, 128, 128).
        activation: must be "swiglu".
        activation_clamp: bounds the gate from above and the up projection on both sides; None for no bound.
        fast_math: approximate exponential and reciprocal in SwiGLU; nothing else changes.
        num_sms: blocks of the launch, to leave SMs to other streams; all SMs by default.
        variant: "auto", "pingpong" or "cooperative"; the setting MEGAMOE_JIT_VARIANT by default.

    Raises:
        ConfigError: an argument is not supported; nothing was launched.
        CaptureError: first use of this kernel during CUDA-graph capture.
        CompileError, LoadError, LaunchError: see their documentation.

    Calls on one buffer are ordered, also across streams; replays of a captured graph are for the caller to order with
    other calls on the same buffer.
    """
    settings = get_settings()
    device = sym_buffer.device
    tokens = y.shape[0] if y.ndim == 2 else -1
    if tokens > sym_buffer.num_max_tokens_per_rank:
        raise ConfigError(
            f"y has {tokens} rows; allowed: at most the buffer's {sym_buffer.num_max_tokens_per_rank} tokens"
        )
    check_tensor("y", y, torch.bfloat16, (max(tokens, 0), sym_buffer.hidden), device)
    clamp = check_recipe(recipe, activation, activation_clamp)
    sms = sm_count(device)
    blocks = sms if num_sms is None else num_sms
    if not 1 <= blocks <= sms:
        raise ConfigError(f"num_sms = {blocks} is not supported; allowed: 1 to {sms}")
    choice = choose(
        sym_buffer.shape,
        tokens,
        ranks=sym_buffer.ranks,
        variant=settings.variant if variant is None else variant,
        cooperative_threshold=settings.cooperative_threshold,
        num_sms=blocks,
    )
    spec = sym_buffer.spec(choice.variant, fast_math)
    check_weights(l1, l2, spec, device)
    stats = cumulative_local_expert_recv_stats
    if stats is not None:
        check_tensor("cumulative_local_expert_recv_stats", stats, torch.int32, (spec.local_experts,), device, align=4)
    if settings.debug:
        check_expert_ids(sym_buffer.topk_idx[:tokens], sym_buffer.num_experts)
    prepared = sym_buffer.prepare(choice.variant, fast_math)
    sym_buffer.launch(prepared, choice, y=y, tokens=tokens, l1=l1, l2=l2, stats=stats, clamp=clamp, num_sms=blocks)


def fp8_mega_moe_pingpong(
    y: torch.Tensor,
    l1: WeightPair,
    l2: WeightPair,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    recipe: Sequence[int] = RECIPE,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_sms: int | None = None,
) -> None:
    """`fp8_mega_moe` with the pingpong kernel (tiles of 64 rows), whatever the token count."""
    fp8_mega_moe(
        y,
        l1,
        l2,
        sym_buffer,
        cumulative_local_expert_recv_stats,
        recipe,
        activation,
        activation_clamp,
        fast_math,
        num_sms=num_sms,
        variant=Variant.PINGPONG.value,
    )


def fp8_mega_moe_cooperative(
    y: torch.Tensor,
    l1: WeightPair,
    l2: WeightPair,
    sym_buffer: SymmBuffer,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    recipe: Sequence[int] = RECIPE,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_sms: int | None = None,
) -> None:
    """`fp8_mega_moe` with the cooperative kernel (tiles of 128 rows), whatever the token count."""
    fp8_mega_moe(
        y,
        l1,
        l2,
        sym_buffer,
        cumulative_local_expert_recv_stats,
        recipe,
        activation,
        activation_clamp,
        fast_math,
        num_sms=num_sms,
        variant=Variant.COOPERATIVE.value,
    )
