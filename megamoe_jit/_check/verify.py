"""Run scenarios through the public interface and judge the result against the FP32 reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import torch

from megamoe_jit._check import scenarios as _scenarios
from megamoe_jit._check.documents import Outcome
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights
from megamoe_jit._errors import ConfigError, DeviceFaultError, PeerTimeoutError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import MoEShape, Variant, WeightFormat
from megamoe_jit._spec.variants import AUTO, VARIANT_NAMES
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference, row_diffs

MAX_DIFF = 2e-4  #: `calc_diff` over all finite rows
MAX_ROW_DIFF = 2e-3  #: `calc_diff` of any one row
GUARD_ROWS = 8  #: rows of the output past the token count, which must stay as they were
FAULTS = (DeviceFaultError, PeerTimeoutError)  #: the CUDA context is gone after these
STATS_BEFORE = 7  #: what the counters hold before a call, because they accumulate


@dataclass(frozen=True, slots=True)
class Runs:
    """Which scenarios are run with which variants, and how.

    Attributes:
        pattern: as in `scenarios.select`.
        variants: ``auto`` or names of variants.
        slow: slow scenarios as well.
        seed: of weights and inputs.
        weights: the format of all weights, instead of the scenarios' own.
        rounds: of several ranks, times that each scenario is run on its buffer.
        skew_us: of several ranks, microseconds that one is late for a launch at most.
    """

    pattern: str = "*"
    variants: Sequence[str] = VARIANT_NAMES
    slow: bool = False
    seed: int = 0
    weights: str | None = None
    rounds: int = 1
    skew_us: int = 0

    def chosen(self, ranks: int = 1) -> tuple[Scenario, ...]:
        """Scenarios that fit, and whose experts the ranks can share evenly; those of one shape next to each other.

        Raises:
            ConfigError: there is none.
        """
        found = _scenarios.select(self.pattern, slow=self.slow, weights=self.weights)
        fitting = [scenario for scenario in found if scenario.shape.experts % ranks == 0]
        if not fitting:
            raise ConfigError(f"no scenario of {self.pattern!r} has experts that {ranks} ranks can share evenly")
        by_shape = {(s.shape, s.weights): i for i, s in reversed(list(enumerate(fitting)))}
        return tuple(sorted(fitting, key=lambda s: by_shape[s.shape, s.weights]))


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an output compares with the reference."""

    diff: float
    worst_row_diff: float
    zero_rows_ok: bool
    passed: bool
    reason: str


def judge(y: torch.Tensor, expected: torch.Tensor) -> Verdict:
    """Compare an output with the reference.

    Rows that are NaN in the reference must be NaN, in the same places; rows that are zero must be zero; all
    others must be finite and within `MAX_DIFF` together and `MAX_ROW_DIFF` each.

    Args:
        y: bfloat16 ``[T, H]``.
        expected: bfloat16 ``[T, H]``.
    """
    nan_rows = expected.isnan().any(dim=-1)
    zero_rows = (expected == 0).all(dim=-1)
    zero_rows_ok = bool((y[zero_rows] == 0).all())
    problems = []
    bad = (y.isnan() != expected.isnan()).any(dim=-1) & nan_rows
    if bad.any():
        problems.append(f"{int(bad.sum())} rows are not NaN where the reference is, first {int(bad.nonzero()[0])}")
    bad = ~y.isfinite().all(dim=-1) & ~nan_rows
    if bad.any():
        problems.append(f"{int(bad.sum())} rows are not finite, first {int(bad.nonzero()[0])}")
    if not zero_rows_ok:
        problems.append("rows that must be zero are not")
    a, b = y[~nan_rows], expected[~nan_rows]
    rows = row_diffs(a, b)
    diff = calc_diff(a, b)
    worst = float(rows.max()) if rows.numel() else 0.0
    if not diff <= MAX_DIFF:
        problems.append(f"diff {diff:.3g} > {MAX_DIFF:g}")
    if not worst <= MAX_ROW_DIFF:
        row = int((~nan_rows).nonzero()[int(rows.argmax())])
        problems.append(f"row diff {worst:.3g} > {MAX_ROW_DIFF:g} in row {row}")
    return Verdict(diff, worst, zero_rows_ok, not problems, "; ".join(problems))


@dataclass(frozen=True, slots=True)
class _Entry:
    weights: Weights
    l1: WeightTensors
    l2: WeightTensors


class WeightCache:
    """Keeps the weights of the last shape and format, as drawn and as the kernel reads them."""

    def __init__(self) -> None:
        self._key: tuple[MoEShape, str, int, str] | None = None
        self._entry: _Entry | None = None

    def get(self, scenario: Scenario, device: torch.device, seed: int, api: Any) -> _Entry:
        """Weights of a scenario on `device`, drawn and transformed unless they are the last ones."""
        shape, stored = scenario.shape, scenario.weights
        key = (replace(shape, topk=1), str(device), seed, stored)
        if self._entry is None or key != self._key:
            self._entry = self._key = None  # frees the old ones first
            weights = _scenarios.make_weights(shape, device, seed, WeightFormat.parse(stored))
            self._entry = _Entry(weights, *api.transform_weights_for_mega_moe_sm90(weights.l1, weights.l2))
            self._key = key
        return self._entry


def stage_with_guards(buffer: Any, inputs: Inputs, experts: int) -> None:
    """Copy inputs into the first rows; the others get what must not matter: NaN that names live experts."""
    buffer.x.view(torch.uint8).fill_(0x7F)  # e4m3 NaN
    buffer.x_sf.fill_(math.nan)
    ids = torch.arange(buffer.topk_idx.numel(), dtype=torch.int64, device=inputs.x.device) % experts
    buffer.topk_idx.copy_(ids.view_as(buffer.topk_idx))
    buffer.topk_weights.fill_(math.nan)
    inputs.stage(buffer)


def buffer_sizes(shape: MoEShape, capacity: int) -> tuple[Any, ...]:
    """Of a buffer, in the order of the function that makes it; shared experts only where there are some."""
    sizes = (shape.experts, capacity, shape.topk, shape.hidden, shape.intermediate)
    return (*sizes, shape.shared) if shape.shared else sizes


def function_of(api: Any, variant: str) -> Any:
    """The public function that runs `auto`, or forces a variant."""
    if variant == AUTO:
        return api.fp8_mega_moe
    name = Variant.parse(variant).value
    own = getattr(api, f"fp8_mega_moe_{name}", None)  # not every variant has one
    return own or functools.partial(api.fp8_mega_moe, variant=name)


def _call(
    api: Any, scenario: Scenario, variant: str, inputs: Inputs, entry: _Entry
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call on a fresh buffer: output bfloat16 ``[T + GUARD_ROWS, H]`` and stats int32 ``[E]``."""
    s, device = scenario.shape, inputs.x.device
    run = function_of(api, variant)
    y = torch.full((scenario.tokens + GUARD_ROWS, s.hidden), math.nan, dtype=torch.bfloat16, device=device)
    stats = torch.full((s.experts,), STATS_BEFORE, dtype=torch.int32, device=device)
    buffer = api.get_symm_buffer_for_mega_moe(None, *buffer_sizes(s, scenario.capacity))
    try:
        stage_with_guards(buffer, inputs, s.experts)
        run(y[: scenario.tokens], entry.l1, entry.l2, buffer, stats, **scenario.options)
        buffer.check()
    except BaseException as error:
        if not is_gone(error, device):  # else nothing on the device can be given back any more
            buffer.destroy()
        raise
    buffer.destroy()
    return y, stats


def is_gone(error: BaseException, device: torch.device) -> bool:
    """Whether what raised this took the CUDA context, or the process group, with it: nothing more can be run."""
    import torch.distributed as dist

    if isinstance(error, FAULTS) or (dist.is_available() and isinstance(error, dist.DistError)):
        return True
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def run_scenario(
    scenario: Scenario,
    variant: str,
    device: torch.device | str,
    *,
    seed: int = 0,
    cache: WeightCache | None = None,
    api: Any = None,
) -> Outcome:
    """Run one scenario once and judge output, counters and the rows around the output.

    Args:
        scenario: What to run.
        variant: ``auto``, or the variant to force.
        device: Where.
        seed: Of weights and inputs.
        cache: Weights of earlier scenarios.
        api: Stands in for the package in tests of this runner.

    Raises:
        MegaMoeError: The layer refused or failed.
    """
    api = api or import_module("megamoe_jit")
    device = torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
    entry = (cache or WeightCache()).get(scenario, device, seed, api)
    inputs = _scenarios.make_inputs(scenario, device, seed, entry.weights)
    y, stats = _call(api, scenario, variant, inputs, entry)
    outcome = outcome_of(scenario, variant, y, expected_of(scenario, inputs))
    counts = expert_counts(inputs.topk_idx, scenario.shape.experts) + STATS_BEFORE
    if torch.equal(stats, counts):
        return outcome
    wrong = int((stats != counts).nonzero()[0])
    return outcome.also(f"counter of expert {wrong} is {int(stats[wrong])}, must be {int(counts[wrong])}")


def expected_of(scenario: Scenario, inputs: Inputs) -> torch.Tensor:
    """What the reference gives, bfloat16 ``[T, H]``; it is told of the numeric options that it knows."""
    return moe_reference(*inputs.operands, activation_clamp=scenario.clamp)


def outcome_of(scenario: Scenario, variant: str, y: torch.Tensor, expected: torch.Tensor) -> Outcome:
    """What a run comes to by its output bfloat16 ``[T + GUARD_ROWS, H]``."""
    verdict = judge(y[: scenario.tokens], expected)
    outcome = Outcome(scenario.name, variant, **asdict(verdict), weights=scenario.weights)
    untouched = bool(y[scenario.tokens :].isnan().all())
    return outcome if untouched else outcome.also("rows past the token count were written")


def failure(scenario: Scenario, variant: str, error: Exception) -> Outcome:
    """What a run comes to that raised this."""
    reason = f"{type(error).__name__}: {error}"
    return Outcome(scenario.name, variant, math.nan, math.nan, False, False, reason, scenario.weights)


def run_all(
    runs: Runs,
    device: torch.device | str = "cuda",
    progress: Callable[[Outcome], None] = lambda _: None,
    *,
    api: Any = None,
) -> list[Outcome]:
    """Run every scenario that is asked for with every variant that multiplies its weights.

    An error fails its scenario, whatever it is, and the run goes on, but a fault of the device ends it: the CUDA
    context is gone, and what was left does not count as run.

    Args:
        runs: Which, and how.
        device: Where.
        progress: Called with each outcome as it comes.
        api: Stands in for the package in tests of this runner.
    """
    outcomes: list[Outcome] = []
    cache, where = WeightCache(), torch.device(device)
    for scenario in runs.chosen():
        for variant in scenario.runs(runs.variants):
            fault = False
            try:
                outcome = run_scenario(scenario, variant, device, seed=runs.seed, cache=cache, api=api)
            except Exception as error:
                fault, outcome = is_gone(error, where), failure(scenario, variant, error)
            outcomes.append(outcome)
            progress(outcome)
            if fault:
                return outcomes
    return outcomes
