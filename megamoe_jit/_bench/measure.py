"""Time the layer on this GPU.

Each row is one shape (one GPU's slice of a model's experts), one token count and one variant.  Before a row
is timed, its output is compared with the FP32 reference.  Contenders take turns within the same rounds: each variant,
each variant with the staging of its inputs, and the unfused layer where it is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

import megamoe_jit
from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, burst, sustained
from megamoe_jit._bench.documents import BaselineRow, Row
from megamoe_jit._bench.rows import rows_of
from megamoe_jit._bench.unfused import Task
from megamoe_jit._bench.unfused_run import add_baselines
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights, make_inputs, make_weights
from megamoe_jit._check.verify import Verdict, buffer_sizes, function_of, judge
from megamoe_jit._device.sms import sm_count
from megamoe_jit._errors import UnsupportedDeviceError
from megamoe_jit._layer.bound_kernel import CallPlan
from megamoe_jit._layer.from_mxfp4 import fp8_from_mxfp4
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit._spec.variants import AUTO, VARIANT_CHOICES
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.heuristics.select import choose
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference

DEFAULT_TOKENS = (16, 64, 256, 512, 1024, 4096, 8192)

#: Token counts below the table, and the shapes that are timed with them by default.
FEW_TOKENS = (1, 2, 4, 8, 32)
FEW_SHAPES = ("v4-flash", "v4-pro")
CHECKED_TOKENS = 64  #: rows compared with the reference; they reach every expert of the default shapes


def require_hopper() -> torch.device:
    """The current CUDA device; raises `UnsupportedDeviceError` unless it is a Hopper."""
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError(
            "no CUDA device that PyTorch can use; this command needs a Hopper GPU (SM90); "
            "`megamoe-jit doctor` says more"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        name = torch.cuda.get_device_name(device)
        raise UnsupportedDeviceError(f"{name} has compute capability {major}.{minor}; this command needs 9.0 (Hopper)")
    return device


def cases(presets: Iterable[Preset], tokens: Sequence[int], weights: str = FP8.name) -> list[Scenario]:
    """One GPU's slice of every preset (its experts over its ranks) at every token count."""
    return [
        Scenario(
            name=p.name,
            shape=MoEShape(p.shape.hidden, p.shape.intermediate, p.local_experts, p.shape.topk),
            tokens=count,
            capacity=count,
            weights=weights,
        )
        for p in presets
        for count in tokens
    ]


def default_cases(presets: Iterable[Preset], weights: str = FP8.name) -> list[Scenario]:
    """The table's token counts for every preset, and the few ones below it for those that have a goal there."""
    return [
        case
        for p in presets
        for case in cases([p], sorted((*DEFAULT_TOKENS, *(FEW_TOKENS if p.name in FEW_SHAPES else ()))), weights)
    ]


def kernel_of(
    shape: MoEShape, tokens: int, variant: str, device: torch.device, ranks: int = 1, weights: str = FP8.name
) -> str:
    """The variant that runs a call of one of `VARIANT_CHOICES` on a device, by the settings and what was measured."""
    settings = get_settings()
    own: dict[str, Any] = {}
    if device.type == "cuda":
        own = {"gpu": torch.cuda.get_device_name(device), "num_sms": sm_count(device)}
    return choose(
        shape,
        tokens,
        ranks=ranks,
        variant=settings.variant if variant == AUTO else variant,
        cooperative_threshold=settings.cooperative_threshold,
        weights=WeightFormat.parse(weights),
        **own,
    ).variant.value


def some_rows(case: Scenario, inputs: Inputs, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of some rows int64 ``[R]``, and their reference bfloat16 ``[R, H]``."""
    count = min(CHECKED_TOKENS, case.tokens)
    where = torch.linspace(0, case.tokens - 1, count, dtype=torch.float64, device=inputs.x_q.device).long()
    return where, moe_reference(
        inputs.x_q.view(torch.uint8)[where].view(torch.float8_e4m3fn),
        inputs.x_sf[where],
        inputs.topk_idx[where],
        inputs.topk_weights[where],
        weights.l1,
        weights.l2,
        activation_clamp=case.clamp,
    )


def as_fp8(weights: Weights) -> Weights:
    """The same values for layers of public parts, which multiply FP8."""
    if weights.l1[0].dtype is not torch.uint8:
        return weights
    return Weights(fp8_from_mxfp4(*weights.l1), fp8_from_mxfp4(*weights.l2))


class Layer:
    """Weights and buffer of one shape on the device, and what is done with them."""

    def __init__(self, shape: MoEShape, max_tokens: int, device: torch.device, weights: WeightFormat = FP8) -> None:
        self.shape = shape
        self.device = device
        self.weights = make_weights(shape, device, 0, weights)
        self.l1, self.l2 = megamoe_jit.transform_weights_for_mega_moe_sm90(self.weights.l1, self.weights.l2)
        self.buffer = megamoe_jit.get_symm_buffer_for_mega_moe(None, *buffer_sizes(shape, max_tokens))

    def call(self, variant: str, y: torch.Tensor, case: Scenario) -> Callable[[], object]:
        function = function_of(megamoe_jit, variant)

        def call() -> object:
            return function(y, self.l1, self.l2, self.buffer, **case.options)

        return call

    def close(self) -> None:
        """Give the buffer's memory back."""
        self.buffer.destroy()

    def launch(self, plan: CallPlan, y: torch.Tensor, case: Scenario) -> None:
        """Make a call by this plan, whatever the heuristics would choose."""
        clamp = math.inf if case.clamp is None else case.clamp
        self.buffer.launch(plan, y=y, tokens=case.tokens, l1=self.l1, l2=self.l2, stats=None, clamp=clamp)

    def check(self, call: TimedCall, y: torch.Tensor, where: torch.Tensor, expected: torch.Tensor) -> Verdict:
        """Judge some rows of one call; every row depends on its own token alone."""
        y.fill_(float("nan"))
        call.stage()
        call.run()
        return judge(y[where], expected)


def _measure(
    layer: Layer, case: Scenario, variants: Sequence[str], flush: torch.Tensor, not_timed: Mapping[str, str] | None
) -> tuple[list[Row], list[BaselineRow]]:
    shape = case.shape
    inputs = make_inputs(case, layer.device, weights=layer.weights)
    y = torch.empty(case.tokens, shape.hidden, dtype=torch.bfloat16, device=layer.device)
    where, expected = some_rows(case, inputs, layer.weights)
    own = {name: TimedCall(layer.call(name, y, case), lambda: inputs.stage(layer.buffer)) for name in variants}
    verdicts = {name: [asdict(layer.check(call, y, where, expected))] for name, call in own.items()}
    calls = {**own, **{f"{name} staged": call.staged() for name, call in own.items()}}
    facts = {}
    if not_timed is not None:
        task = Task(inputs, as_fp8(layer.weights), shape.experts, case.clamp)
        facts = add_baselines(calls, not_timed, task, lambda out: calc_diff(out[where], expected))
    part = {
        "times": burst(calls, flush),
        "verdicts": verdicts,
        "sustained": {name: sustained(call) for name, call in own.items()},
        "expert_rows": expert_counts(inputs.topk_idx, shape.experts).tolist(),
        "baselines": facts,
    }
    kernels = {name: kernel_of(shape, case.tokens, name, layer.device, weights=case.weights) for name in own}
    return rows_of(case, kernels, [part])


def measure(
    work: Sequence[Scenario],
    variants: Sequence[str] = VARIANT_CHOICES,
    progress: Callable[[Row], None] = lambda _: None,
    *,
    between: Callable[[], None] = lambda: None,
    not_timed: Mapping[str, str] | None = None,
    baselines: list[BaselineRow] | None = None,
) -> list[Row]:
    """Measure all of `work` on the current CUDA device.

    Args:
        work: Cases; those of one shape share weights and buffer.
        variants: Names from `VARIANT_CHOICES`.
        progress: Called with each row as it is measured.
        between: Called between shapes, when nothing of the last one is left on the device.
        not_timed: Time the unfused layer too, but for the methods that this names with a reason; not at all if None.
        baselines: Takes the rows of the unfused layer.

    Raises:
        UnsupportedDeviceError: There is no Hopper GPU.
    """
    device = require_hopper()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    rows: list[Row] = []
    layers = dict.fromkeys((case.name, case.shape, case.weights) for case in work)
    for number, (name, shape, weights) in enumerate(layers):
        group = [case for case in work if (case.name, case.shape, case.weights) == (name, shape, weights)]
        torch.cuda.empty_cache()
        if number:
            between()
        most = max(case.capacity for case in group)
        with closing(Layer(shape, most, device, WeightFormat.parse(weights))) as layer:
            for case in group:
                found, others = _measure(layer, case, case.runs(variants), flush, not_timed)
                if baselines is not None:
                    baselines.extend(others)
                for row in found:
                    rows.append(row)
                    progress(row)
        del layer
    torch.cuda.empty_cache()
    return rows
