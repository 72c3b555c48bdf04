"""`--moe-runner-backend megamoe_jit`: experts under tensor or expert parallelism of any size, without all-to-all.

SGLang gathers tokens and sums results itself; a rank has its experts, or its part of each, and ids of its own. What
there is no kernel for is refused while the model is built, since it was asked for by name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.aside import no_shape
from megamoe_jit.engines.held import HeldExperts
from megamoe_jit.engines.local import LocalExperts
from megamoe_jit.engines.sglang import weights
from megamoe_jit.engines.sglang.hooks import around

BACKEND = "megamoe_jit"
_ALLOWED = "experts in MXFP4, or FP8 with blocks of 128 x 128"
_READY = "_megamoe_jit_ready"  #: of a layer
#: The configuration of the layer that a runner is made for.
_looked_at: ContextVar[Any] = ContextVar("looked_at", default=None)


class _Ready(NamedTuple):
    """What a layer needs to run."""

    held: HeldExperts
    run: LocalExperts


def hook() -> None:
    """Make the backend one that can be chosen, and have `Fp8MoEMethod` know it."""
    _module("layers.moe.moe_runner.runner").register_moe_runner_core(BACKEND, _core_of)
    around(f"{weights.FP8_METHOD}.create_moe_runner", _create_runner)
    around(f"{weights.FP8_METHOD}.process_weights_after_loading", _process)
    _module("arg_groups.choices").add_moe_runner_backend_choices([BACKEND])  # last: then it works


def _module(name: str) -> Any:
    return importlib.import_module(f"sglang.srt.{name}")


def _core_of(config: Any) -> Any:
    """A runner's core, for layers that were looked at; SGLang makes runners for others and for LoRA as well."""
    if _looked_at.get() is not config:
        method = type(getattr(getattr(config, "layer", None), "quant_method", None)).__name__
        raise ConfigError(
            f"--moe-runner-backend {BACKEND} with experts by {method}, or LoRA on them; allowed: {_ALLOWED}, no "
            "LoRA. Next: another runner backend, for experts of a draft model alone by --speculative-moe-runner-backend"
        )
    return _core_class()(config)


@functools.cache
def _core_class() -> Any:
    """The runner's core, a subclass of SGLang's, which is imported only here."""
    base: Any = _module("layers.moe.moe_runner.base").DispatchMoeRunnerCore
    backend = _module("layers.moe.utils").RegisteredMoeRunnerBackend(BACKEND)
    combined = _module("layers.moe.token_dispatcher.standard").StandardCombineInput

    class MegaMoeRunnerCore(base):  # type: ignore[misc]
        """Runs a dispatched batch through a layer's local experts."""

        @property
        def runner_backend(self) -> Any:
            return backend

        def run_from_dispatch(
            self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None
        ) -> Any:
            if not isinstance(quant_info, _Ready) or hooks is not None:
                given = "LoRA" if hooks is not None else type(quant_info).__name__
                raise ConfigError(f"--moe-runner-backend {BACKEND} with {given}; allowed: {_ALLOWED}")
            x = dispatch_output.hidden_states
            topk_weights, topk_ids, *_ = dispatch_output.topk_output
            factor = 1.0 if runner_config.routed_scaling_factor is None else float(runner_config.routed_scaling_factor)
            held, run = quant_info
            y = run(held.l1, held.l2, x, topk_ids, topk_weights, runner_config.swiglu_limit, factor)
            return combined(hidden_states=y if x.dtype == y.dtype else y.to(x.dtype))

    return MegaMoeRunnerCore


def _is_ours(method: Any) -> bool:
    backend = getattr(getattr(method, "runner", None), "runner_backend", None)
    return getattr(backend, "value", None) == BACKEND


def _create_runner(original: Callable[..., None], method: Any, layer: Any, moe_runner_config: Any) -> None:
    utils = _module("layers.moe.utils")
    backend = utils.get_moe_runner_backend()
    if backend.value != BACKEND:
        mega = utils.get_moe_a2a_backend().is_megamoe() and weights.on_hopper()
        shared = weights.shared_among_packed(method, layer) if mega else ""
        if shared:  # SGLang would end with sizes of tensors that do not fit
            raise ConfigError(f"--moe-a2a-backend megamoe cannot run this model: {shared}")
        original(method, layer, moe_runner_config)
        return
    reasons = list(_refusals(method, layer, moe_runner_config))
    if reasons:
        raise ConfigError(
            f"--moe-runner-backend {BACKEND} cannot run this model: {'; '.join(reasons)}. Next: another runner backend"
        )
    method.moe_runner_config = moe_runner_config
    token = _looked_at.set(moe_runner_config)
    try:
        method.runner = _module("layers.moe.moe_runner.runner").MoeRunner(backend, moe_runner_config)
    finally:
        _looked_at.reset(token)
    method._owns_moe_runner = True


def _refusals(method: Any, layer: Any, config: Any) -> Iterator[str]:
    """Why there is no kernel for a layer, each with what there is one for."""
    yield from weights.other_sums(config)
    yield from weights.left_by_another()
    a2a = _module("layers.moe.utils").get_moe_a2a_backend()
    if not a2a.is_none():
        yield f"--moe-a2a-backend {a2a.value}; allowed: none"
    if method.use_mxfp8:
        yield "experts in MXFP8; allowed: MXFP4, or FP8 with blocks of 128 x 128"
    if not method.is_fp4_expert and list(method.weight_block_size or ()) != [128, 128]:
        yield f"blocks of {method.weight_block_size}; allowed: [128, 128]"
    if config.no_combine:
        yield "no_combine; allowed: results summed over a token's experts"
    if getattr(method, "with_bias", False):
        yield "biases; allowed: none"
    if shared := weights.shared_among_packed(method, layer):
        yield shared
    if not weights.on_hopper():
        yield "this GPU; allowed: Hopper (H100, H200, H20)"
    if getattr(_module("runtime_context").get_parallel(), "dwdp_size", 1) > 1:
        yield "--dwdp-size, which exchanges weights later; allowed: none"
    sizes = config.hidden_size, config.intermediate_size_per_partition, config.num_local_experts, _slots(layer, config)
    if shape := no_shape(*sizes):
        yield shape


def _slots(layer: Any, config: Any) -> int:
    """Of a token; shared experts may have some beside these."""
    return int(layer.top_k if config.top_k is None else config.top_k)


def _process(original: Callable[..., Any], method: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_ours(method):
        return original(method, layer, *args, **kwargs)
    weights.give_back(layer)  # what follows a load begins with what was loaded
    result = original(method, layer, *args, **kwargs)
    known: _Ready | None = getattr(layer, _READY, None)
    _prepare(layer, known.run.shape.topk if known else _slots(layer, layer.moe_runner_config))
    return result


def _prepare(layer: Any, topk: int) -> _Ready:
    """Take a layer over, and make the buffer for so many slots of a token unless it has it: graphs know its address."""
    held, known = weights.take(layer), getattr(layer, _READY, None)
    shape = MoEShape(held.hidden, held.intermediate, held.experts, topk)
    if known is not None and (known.run.shape, known.held.weights) == (shape, held.weights):
        run = known.run
    else:
        run = LocalExperts(shape, held.l1[0].device, weights=held.weights)
    ready = _Ready(held, run)
    setattr(layer, _READY, ready)
    setattr(layer, weights.RUN, functools.partial(_run, layer))
    return ready


def _run(layer: Any, method: Any, dispatch_output: Any, *_: Any, **__: Any) -> Any:
    ready: _Ready = getattr(layer, _READY)
    slots = dispatch_output.topk_output[1].shape[1]
    if slots != ready.run.shape.topk:  # shared experts in slots of their own
        ready = _prepare(layer, slots)
    return method.runner.run(dispatch_output, ready)
