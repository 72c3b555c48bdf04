"""A layer in place of an experts module: made at the first call, undone when somebody else wants the weights.

FP8 and MXFP4 are brought into the kernel's order where they are, since a model's experts have no place twice. Until
they are brought back the module has parameters without values, on meta, in their place, so that nobody takes them for
what they were. They come back by themselves when the module is called with another implementation, when its state is
saved, and before another one is loaded. Values stay where they are, and the layer has FP8 of them beside, which lasts
while the parameters are those that it was made of (`Seen`), whoever computes in between.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._layer.moe import MegaMoE
from megamoe_jit._layer.quantize import quantize_activations, quantize_weights
from megamoe_jit._layer.weights import inverse_transform_weights_for_mega_moe_sm90
from megamoe_jit.reference import moe_reference
from megamoe_jit.transformers.experts import CODES, SCALES, Held, look_at
from megamoe_jit.transformers.fit import NAME

ATTRIBUTE = "_megamoe_jit"  #: of a module that has a layer
_HOOKED = "_megamoe_jit_hooked"
#: The layer's buffers by the parameters whose memory they may be.
_BUFFERS = dict(zip((*CODES, *SCALES), ("l1_codes", "l2_codes", "l1_exponents", "l2_exponents"), strict=True))

_lock = threading.RLock()
renew_after_fork(globals(), "_lock")


@dataclass
class Options:
    """How layers are made from now on.

    Attributes:
        max_tokens: most tokens of a launch; larger batches are served in parts. Layers of a model share one workspace
            of this size.
        fast_math: as `MegaMoE`.
    """

    max_tokens: int = 4096
    fast_math: bool = True


options = Options()


class _OnCpu:
    """The layer by its reference, for tests and small trials."""

    def __init__(self, held: Held) -> None:
        self.weights = [pair if isinstance(pair, tuple) else quantize_weights(pair) for pair in (held.w13, held.w2)]
        self.clamp = held.clamp

    def __call__(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        inputs = *quantize_activations(x), topk_idx, topk_weights.float()
        return moe_reference(*inputs, *self.weights, activation_clamp=self.clamp)


class Seen(NamedTuple):
    """A parameter as it was when a layer was made of it.

    Attributes:
        parameter: a weak reference to the object itself.
        address: of its values, which moving it or a new `data` changes.
        version: torch's count of writes in place, which writes through `data` escape; None where torch does not count,
            of parameters that were made in inference mode.
    """

    parameter: Callable[[], torch.Tensor | None]
    address: int
    version: int | None

    @classmethod
    def of(cls, parameter: torch.Tensor) -> Seen:
        return cls(weakref.ref(parameter), parameter.data_ptr(), _version_of(parameter))

    def __reduce__(self) -> Any:
        return Seen, (_nobody, 0, None)  # where it arrives nothing is what was seen

    def is_now(self, parameter: torch.Tensor | None) -> bool:
        """Whether this is the parameter, and nothing has happened to it."""
        return (
            parameter is not None
            and self.parameter() is parameter
            and self.address == parameter.data_ptr()
            and self.version == _version_of(parameter)
        )


def _nobody() -> None:
    """In place of a weak reference, which cannot be sent."""


def _version_of(parameter: torch.Tensor) -> int | None:
    return None if parameter.is_inference() else parameter._version


class Adapter:
    """The layer of one module.

    Attributes:
        layer: `MegaMoE`, or the reference on a CPU.
        topk: most slots of a token.
        device: where the layer is.
        taken: parameters whose memory is the layer's, by name.
        seen: what stands in the module in place of these, and the others that it was made of, by name.
        lasts: whether it may stay while somebody else reads, or writes, the module's parameters.
    """

    def __init__(
        self, layer: Any, topk: int, device: torch.device, taken: dict[str, torch.nn.Parameter], seen: dict[str, Seen]
    ) -> None:
        self.layer, self.topk, self.device, self.taken, self.seen = layer, topk, device, taken, seen
        self.lasts = not taken and all(each.version is not None for each in seen.values())

    def serves(self, module: Any, topk: int, device: torch.device) -> bool:
        """Whether calls of a module with so many slots are this layer's; compiled ones look at no weights."""
        if self.device != device or topk > self.topk:
            return False
        if torch.compiler.is_compiling():
            return True
        held = module._parameters
        return all(each.is_now(held.get(name)) for name, each in self.seen.items())

    def stands_in(self, parameter: torch.Tensor | None, name: str) -> bool:
        """Whether a parameter is what a module has in place of one that was taken, and none that somebody put there."""
        return name not in self.seen or self.seen[name].parameter() is parameter

    def __call__(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0:
            return torch.zeros_like(x)
        missing = self.topk - topk_idx.shape[1]
        if missing:
            topk_idx = torch.nn.functional.pad(topk_idx, (0, missing), value=-1)
            topk_weights = torch.nn.functional.pad(topk_weights, (0, missing))
        y: torch.Tensor = self.layer(x, topk_idx, topk_weights)
        return y.to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        layer = copy.deepcopy(self.layer, memo)
        taken = {
            name: torch.nn.Parameter(getattr(layer, _BUFFERS[name]).view(mine.dtype), requires_grad=False)
            for name, mine in self.taken.items()
        }
        seen = dict(self.seen)
        for name, each in self.seen.items():
            now = each.parameter()
            copied = memo.get(id(now))  # a module's parameters are copied before its layer
            if copied is not None and each.is_now(now):  # else the copy's layer has other values than its parameters
                seen[name] = Seen.of(copied)
        return Adapter(layer, self.topk, self.device, taken, seen)


def _adapter_of(module: Any, topk: int, device: torch.device) -> Adapter:
    """The layer of a module for calls with `topk` slots, made unless it is there.

    Raises:
        ConfigError: the module cannot be this layer; says why.
        MegaMoeError: the layer cannot be made here.
    """
    with _lock:
        found: Adapter | None = getattr(module, ATTRIBUTE, None)
        if found is not None and found.serves(module, topk, device):
            return found
        if found is not None:
            _release(module)
        made = _on_cpu(module, topk) if device.type == "cpu" else _on_gpu(module, topk, device)
        setattr(module, ATTRIBUTE, made)
        _hook(module)
        return made


def _on_cpu(module: Any, topk: int) -> Adapter:
    warnings.warn(
        f'experts_implementation="{NAME}" on a CPU computes by the reference, which is slow and for trials alone',
        stacklevel=2,
    )
    return Adapter(_OnCpu(look_at(module)), topk, torch.device("cpu"), {}, _seen(module))


def _on_gpu(module: Any, topk: int, device: torch.device) -> Adapter:
    held = look_at(module)
    how: dict[str, Any] = {"topk": topk, "max_tokens": options.max_tokens, "fast_math": options.fast_math}
    layer = MegaMoE(held.w13, held.w2, clamp=held.clamp, inplace=bool(held.taken), **how)
    taken = {name: module._parameters[name] for name in held.taken}
    made = Adapter(layer, topk, device, taken, _seen(module, held.taken))
    setattr(module, ATTRIBUTE, made)  # before the module has them no more: whatever ends this, they are somebody's
    for name, mine in taken.items():
        empty = torch.empty(mine.shape, dtype=mine.dtype, device="meta")
        stands_in = module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        made.seen[name] = Seen.of(stands_in)
    return made


def _seen(module: Any, taken: tuple[str, ...] = ()) -> dict[str, Seen]:
    held = module._parameters
    return {name: Seen.of(held[name]) for name in (*CODES, *SCALES) if name not in taken and name in held}


def _release(module: Any) -> bool:
    """Give a module its weights back, in the order in which it had them; whether it had a layer."""
    with _lock:
        found: Adapter | None = module.__dict__.get(ATTRIBUTE)
        if found is None:
            return False
        if found.taken:  # nobody else has these weights: whatever is refused, as in a capture, leaves them to the layer
            layer = found.layer
            layer.buffer.wait_for_last()
            inverse_transform_weights_for_mega_moe_sm90(layer.l1, layer.l2, inplace=True)
            module._parameters.update(
                (name, mine)
                for name, mine in found.taken.items()
                if found.stands_in(module._parameters.get(name), name)
            )
        del module.__dict__[ATTRIBUTE]
        if isinstance(found.layer, MegaMoE):
            found.layer.destroy()
        return True


def _hook(module: Any) -> None:
    """Have the weights come back before somebody else sees them; once for each module."""
    if module.__dict__.get(_HOOKED):
        return
    module.__dict__[_HOOKED] = True
    module.register_forward_pre_hook(_before_forward)
    module.register_state_dict_pre_hook(_before_state)
    module.register_load_state_dict_pre_hook(_before_load)


def _before_forward(module: Any, _: object) -> None:
    if module.config._experts_implementation != NAME:
        _step_aside(module)


#: Weights are moved and made, which is no part of any graph.
_outside_of_graphs: Any = torch._dynamo.disable
adapter_of: Callable[[Any, int, torch.device], Adapter] = _outside_of_graphs(_adapter_of)
release_module: Callable[[Any], bool] = _outside_of_graphs(_release)


def _step_aside(module: Any) -> None:
    """Have a module's weights be its own again, for somebody who reads them."""
    found: Adapter | None = getattr(module, ATTRIBUTE, None)
    if found is not None and not found.lasts:
        release_module(module)


def _before_state(module: Any, *_: object) -> None:
    _step_aside(module)


def _before_load(module: Any, *_: object) -> None:
    release_module(module)


def refuse_gradients(x: torch.Tensor) -> None:
    """Raise where a backward pass would be missing."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError(
            f'experts_implementation="{NAME}" has no backward pass; allowed: calls under torch.no_grad() or '
            "torch.inference_mode(), as generate() does"
        )
