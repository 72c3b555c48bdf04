"""The layer as operators of torch: what `torch.compile`, `torch.export` and other tracers see instead of the launch.

`moe` is functional: it has no effect but its result. The workspace that it writes into belongs to nobody else, so it
is no argument but a name, which is the same for all layers that share it, and in every process. Weights are arguments:
so a tracer knows them as the buffers of their module, one compiled block serves all layers of a model, and
`functional_call` may exchange them. `moe_into` writes its result where the caller says.

A tracer may hand over copies of the weights, which have no mark of their order. The name says it in their stead: it
begins with the order of the version that gave it, so a program that was exported by another one finds no workspace.

The operators exist from the import of this module on, which is that of `megamoe_jit.MegaMoE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.serving import serve
from megamoe_jit._layer.weights import is_transformed, mark_transformed
from megamoe_jit._layer.workspace import buffer_named

_ARGUMENTS = (
    "Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor l1_codes, Tensor l1_scales, Tensor l2_codes, "
    "Tensor l2_scales, str workspace, float? clamp=None, bool fast_math=True, float shared_weight=1.0, "
    "Tensor? l1_exponents=None, Tensor? l2_exponents=None"
)
#: The operators live as long as this object.
_library = torch.library.Library("megamoe_jit", "DEF")  # type: ignore[no-untyped-call]


def is_traced() -> bool:
    """Whether somebody records what torch does, and must be shown an operator; eager calls save its host time."""
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def as_arguments(l1: WeightTensors, l2: WeightTensors) -> tuple[WeightTensors, WeightTensors]:
    """The weights of a layer as the operators take them: codes and scales of both matrices, and exponents of both."""
    return (l1[0], l1[-1], l2[0], l2[-1]), (*l1[1:-1], *l2[1:-1])


def _matrix(codes: torch.Tensor, exponents: torch.Tensor | None, scales: torch.Tensor) -> WeightTensors:
    """The tensors of a matrix.

    FP8 codes may come as bytes: torch's own check of an operator, and other tools, cannot compare FP8 numbers. Codes
    with exponents are bytes anyhow.
    """
    if exponents is not None:
        return codes, exponents, scales
    return codes.view(torch.float8_e4m3fn) if codes.dtype is torch.uint8 else codes, scales


def _in_order(l1: WeightTensors, l2: WeightTensors) -> tuple[WeightTensors, WeightTensors]:
    """The weights, marked as being in the order that the name of their workspace says."""
    if not is_transformed(l1, l2):
        mark_transformed(l1, l2)
    return l1, l2


def _moe(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1_codes: torch.Tensor,
    l1_scales: torch.Tensor,
    l2_codes: torch.Tensor,
    l2_scales: torch.Tensor,
    workspace: str,
    clamp: float | None = None,
    fast_math: bool = True,
    shared_weight: float = 1.0,
    l1_exponents: torch.Tensor | None = None,
    l2_exponents: torch.Tensor | None = None,
    *,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    buffer = buffer_named(workspace)
    weights = _in_order(_matrix(l1_codes, l1_exponents, l1_scales), _matrix(l2_codes, l2_exponents, l2_scales))
    return serve(buffer, x, topk_idx, topk_weights, *weights, clamp, fast_math, shared_weight, y)


def _moe_into(y: torch.Tensor, *arguments: Any, **options: Any) -> None:
    _moe(*arguments, **options, y=y)


def _moe_fake(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Its result without values; sizes may be symbols, so what they must be is checked by the call itself."""
    if x.ndim != 2:
        raise ConfigError(f"x has {x.ndim} dimensions; allowed: 2, [tokens, hidden]")
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)


def _moe_into_fake(*_: object, **__: object) -> None:
    pass


def _define(name: str, schema: str, call: Callable[..., object], fake: Callable[..., object]) -> None:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, call, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    # Results need no gradient, as those of eager calls: there is no backward pass.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"megamoe_jit::{name}", fake, lib=_library)


_define("moe", f"({_ARGUMENTS}) -> Tensor", _moe, _moe_fake)
_define("moe_into", f"(Tensor(a!) y, {_ARGUMENTS}) -> ()", _moe_into, _moe_into_fake)
