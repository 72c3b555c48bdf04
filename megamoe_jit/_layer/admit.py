"""What calls of the layer check alike, however their inputs come."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_expert_ids, check_tensor, check_weights
from megamoe_jit._layer.given_weights import WeightTensors, format_of_call
from megamoe_jit._layer.group import collectively
from megamoe_jit._spec import Variant
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics, numerics_of


def admit_first(
    buffer: SymmBuffer,
    admit: Callable[[], tuple[int, float]],
    weights: tuple[WeightTensors, WeightTensors],
    variant: str | None,
    numeric: tuple[bool, ...],
    num_sms: int | None,
    inputs: Inputs,
) -> None:
    """Before the kernels of several ranks are prepared: what one of them refuses is refused on all."""
    try:
        known = buffer.kernels.is_prepared(numerics_of(*numeric), inputs, format_of_call(weights[0]))
    except (ConfigError, TypeError):  # refused: on all ranks where these have prepared nothing yet, else on this one
        known = buffer.kernels.any_prepared(inputs)
    if known or torch.cuda.is_current_stream_capturing():
        return  # in a capture, preparing refuses

    def check() -> Variant:
        tokens, _ = admit()
        stored = format_of_call(weights[0])
        choice, _ = buffer.kernels.choose(tokens, variant, num_sms, stored)
        spec = buffer.kernels.spec(choice.variant, Numerics(*numeric), inputs, stored)
        check_weights(*weights, spec, buffer.device)
        return choice.variant

    chosen = collectively(buffer.group, "checking the arguments of the first call", check)
    if inputs is Inputs.RAW:  # together with the others, some of which may stage by a launch of its own
        name = format_of_call(weights[0]).name
        buffer.prepare(chosen, Numerics(*numeric), raw=True, weight_format=name)


def check_stats(stats: torch.Tensor, buffer: SymmBuffer) -> None:
    """Raise `ConfigError` unless there is a counter for each local expert."""
    experts = (buffer.num_experts // buffer.ranks,)
    check_tensor("cumulative_local_expert_recv_stats", stats, torch.int32, experts, buffer.device, align=4)


def check_ids(topk_idx: torch.Tensor, buffer: SymmBuffer) -> None:
    """In debug mode: every id is an expert or -1; not in a capture, for it waits for the device."""
    if not torch.cuda.is_current_stream_capturing():
        check_expert_ids(topk_idx, buffer.num_experts)
