"""What an experts module of transformers holds and computes, in this layer's terms; or why it cannot be this layer.

What a module computes between its two products is asked of the module itself: its `_apply_gate` gets some numbers, and
they must come back as the layer would give them. So a model with another activation is refused, whatever it calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors, e8m0_of
from megamoe_jit._spec import BLOCK
from megamoe_jit._text import shown
from megamoe_jit.reference import activate

CODES = ("gate_up_proj", "down_proj")  #: parameters of a module
SCALES = ("gate_up_proj_scale_inv", "down_proj_scale_inv")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TOLERANCE = 2.0**-16
#: Attributes that modules have where they compute something else: the value that means nothing, and what another means.
_PLAIN = {
    "has_bias": (False, "biases, as gpt-oss has them"),
    "has_gate": (True, "no gate"),
    "is_concatenated": (True, "gate and up rows in turns"),
    "is_transposed": (False, "rows and columns exchanged"),
    "has_post_expert_norm": (False, "a norm behind each expert"),
}
_NOTHING_ELSE = ("swiglu_alpha", "alpha", "gate_softcap", "up_softcap")


@dataclass(frozen=True, slots=True)
class Held:
    """The experts of a module.

    Attributes:
        w13, w2: values, or codes and float32 scales; the tensors of the module themselves where they can be.
        taken: names of the module's parameters whose memory these are: what the transform writes, which may be there.
        clamp: bound of SwiGLU; None for none.
    """

    w13: torch.Tensor | WeightTensors
    w2: torch.Tensor | WeightTensors
    taken: tuple[str, ...]
    clamp: float | None


def look_at(module: Any) -> Held:
    """What a module holds.

    Raises:
        ConfigError: it cannot be this layer; says why.
    """
    what = type(module).__name__
    for name, (plain, meaning) in _PLAIN.items():
        found = getattr(module, name, plain)
        if found is not plain:
            step = 'or experts_implementation="grouped_mm" for this model'
            raise ConfigError(f'{what} has {name} = {shown(found)}: {meaning}; allowed with "megamoe": {plain}, {step}')
    for name in _NOTHING_ELSE:
        if getattr(module, name, None) is not None:
            given = f"{what} has {name} = {shown(getattr(module, name))}"
            raise ConfigError(f'{given}; allowed with "megamoe": none, the layer computes silu(gate) * up and a clamp')
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
        raise ConfigError(f'{what} is offloaded; allowed with "megamoe": weights that stay on their device')
    computed = [name for name in CODES if name not in module._parameters]
    if computed:  # a layer made of these values would not notice when others are computed
        raise ConfigError(
            f'{what} computes {computed[0]} at each call, as LoRA on experts does; allowed with "megamoe": a '
            "parameter. Next: merge what is added to it"
        )
    clamp = _clamp_of(module, what)
    gate_up, down = module.gate_up_proj, module.down_proj
    if gate_up.device.type == "meta":
        raise ConfigError(f"weights of {what} are on meta, which holds no values; load the model first")
    if gate_up.dtype in _FLOATS:
        return Held(gate_up.detach(), down.detach(), (), clamp)
    block = getattr(module, "block_size", None)
    if gate_up.dtype is torch.float8_e4m3fn:
        if block is None or tuple(block) != (BLOCK, BLOCK):
            raise ConfigError(f'{what} has block_size {shown(block)}; allowed with "megamoe": ({BLOCK}, {BLOCK})')
        if getattr(module, "activation_scheme", "dynamic") != "dynamic":
            raise ConfigError(f'{what} has static scales of activations; allowed with "megamoe": "dynamic"')
        pairs = [(getattr(module, name).detach(), _scales(module, name).float()) for name in CODES]
        return Held(pairs[0], pairs[1], CODES, clamp)
    if gate_up.dtype is torch.int8:
        pairs = [(getattr(module, name).detach(), _exponents(module, name, what)) for name in CODES]
        mine = (_scales(module, name).dtype is torch.float8_e8m0fnu for name in CODES)
        return Held(pairs[0], pairs[1], (*CODES, *SCALES) if all(mine) else (), clamp)
    allowed = "bfloat16, float16, float32, float8_e4m3fn, or int8 for pairs of MXFP4"
    raise ConfigError(f'{what} has weights of {gate_up.dtype}; allowed with "megamoe": {allowed}')


def _scales(module: Any, name: str) -> torch.Tensor:
    scales: torch.Tensor = getattr(module, f"{name}_scale_inv").detach()
    return scales


def _exponents(module: Any, name: str, what: str) -> torch.Tensor:
    """Scales of MXFP4 as e8m0, which they are, or are made of powers of two."""
    try:
        return e8m0_of(_scales(module, name)).view(torch.float8_e8m0fnu)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


@torch.no_grad()
def _clamp_of(module: Any, what: str) -> float | None:
    """The bound with which the layer computes what the module's gate does."""
    said = [getattr(module, "limit", None), getattr(getattr(module, "config", None), "swiglu_limit", None)]
    bounds: list[float | None] = [None, *(float(each) for each in said if isinstance(each, int | float) and each > 0)]
    reach = 4.0 * max(4.0, *(bound or 0.0 for bound in bounds))
    here: Any = {"dtype": torch.float32, "device": "cpu"}
    gate = torch.linspace(-reach, reach, 61, **here).repeat_interleave(5).unsqueeze(0)
    up = torch.linspace(-reach, reach, 5, **here).repeat(61).unsqueeze(0)
    try:
        found = module._apply_gate(torch.cat((gate, up), dim=-1))
        for bound in bounds:
            wanted = activate(gate, up, bound)
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                return bound
    except Exception as error:
        raise ConfigError(f"the gate of {what} cannot be asked what it computes: {error}") from error
    raise ConfigError(
        f'the gate of {what} computes something else than silu(gate) * up; "megamoe" has that and a clamp'
    )
