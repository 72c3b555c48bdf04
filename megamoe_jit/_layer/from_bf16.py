"""`mega_moe_from_bf16`: the layer as a model calls it, staged in the launch itself where that can be."""

from __future__ import annotations

from typing import Any

import torch

from megamoe_jit._layer.admit import admit_first, check_ids, check_stats
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_shared_weight, check_tensor
from megamoe_jit._layer.given_weights import FORMAT_BY_TYPE, WeightTensors, format_of_call
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._layer.stage import require_buffer
from megamoe_jit._spec import check_clamp
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics, numerics_of

_RAW, _STAGED = Inputs.RAW, Inputs.STAGED  # a look-up less for each call


def mega_moe_from_bf16(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1_weights: WeightTensors,
    l2_weights: WeightTensors,
    sym_buffer: SymmBuffer,
    *,
    y: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    activation_clamp: float | None = None,
    fast_math: bool = True,
    num_sms: int | None = None,
    variant: str | None = None,
    shared_weight: float = 1.0,
) -> torch.Tensor:
    """`stage` and `fp8_mega_moe` in one: the layer from the inputs that a model has.

    Activations in bf16 whose rows start at multiples of 16 bytes are staged by the layer's kernel itself, in the same
    launch; any other by a launch of its own before.  Both give the same bits.

    Args:
        x, topk_idx, topk_weights, x_scales, routed_scaling_factor: as `stage` takes them.
        l1_weights, l2_weights, cumulative_local_expert_recv_stats, activation_clamp, fast_math, num_sms, variant,
            shared_weight: as `fp8_mega_moe` takes them.
        sym_buffer: whose views are overwritten.
        y: bf16 ``[T, hidden]`` to write; a new tensor by default.

    Returns:
        `y`; the kernel may still be running.

    Raises:
        MegaMoeError: as `fp8_mega_moe`, with several ranks too.
    """
    buffer = sym_buffer if isinstance(sym_buffer, SymmBuffer) else require_buffer(sym_buffer)
    stats = cumulative_local_expert_recv_stats
    numeric = (fast_math,)  # the fields of `Numerics`
    raw: Any = None

    def admit() -> tuple[int, float]:
        nonlocal raw
        if type(shared_weight) is not float or shared_weight != 1.0:
            check_shared_weight(shared_weight, buffer.num_shared_experts)
        raw = buffer.read_inputs(x, topk_idx, topk_weights, x_scales, routed_scaling_factor)
        if y is not None:
            check_tensor("y", y, torch.bfloat16, (raw.tokens, buffer.hidden), buffer.device)
        if stats is not None:
            check_stats(stats, buffer)
        return raw.tokens, check_clamp("activation_clamp", activation_clamp)

    weights = (l1_weights, l2_weights)
    if buffer.ranks > 1:
        admit_first(buffer, admit, weights, variant, numeric, num_sms, Inputs.RAW)
    _, clamp = admit()
    return run_batch(buffer, raw, weights, clamp, numeric, y, stats, num_sms, variant, shared_weight)


def run_batch(
    buffer: SymmBuffer,
    raw: RawInputs,
    weights: tuple[WeightTensors, WeightTensors],
    clamp: float,
    numeric: tuple[bool, ...],
    y: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
    num_sms: int | None = None,
    variant: str | None = None,
    shared_weight: float = 1.0,
) -> torch.Tensor:
    """What `mega_moe_from_bf16` does with what it has checked: stage and launch.

    Args:
        raw: the batch, for which the buffer has room.
        weights: of both products; checked at the launch.
        clamp: as the kernel takes it, infinity for none.
        numeric: the options that are fields of `Numerics`, in their order.
        y: as `raw` wants it; a new tensor by default.
        buffer, stats, num_sms, variant, shared_weight: as there.

    Returns:
        `y`; the kernel may still be running.

    Raises:
        MegaMoeError: as there.
    """
    tokens, fused = raw.tokens, raw.fused
    try:
        numerics = numerics_of(*numeric)
    except TypeError:  # what cannot be hashed is no option either
        numerics = Numerics(*numeric)
    try:
        stored = FORMAT_BY_TYPE[weights[0][0].dtype]
    except Exception:  # costs nothing where it is a tuple of tensors
        stored = format_of_call(weights[0])
    plan = buffer.plan(tokens, variant, numerics, num_sms, _RAW if fused else _STAGED, stored)
    if plan.debug:
        check_ids(raw.topk_idx, buffer)
    if y is None:
        y = torch.empty(tokens, buffer.hidden, dtype=torch.bfloat16, device=buffer.device)
    if fused:
        buffer.launch(plan, y, tokens, weights[0], weights[1], stats, clamp, raw, shared_weight)
        return y
    with buffer.lock:  # another thread's inputs come after this call
        buffer.stage_inputs(raw, tokens)
        buffer.launch(plan, y, tokens, weights[0], weights[1], stats, clamp, None, shared_weight)
    return y
