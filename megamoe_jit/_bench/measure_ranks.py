"""Time the layer on several GPUs: beside the same code on one of them, and beside an unfused layer.

The protocol of `measure`, and: all ranks are aligned on the device, by a tiny all-reduce right before the timed call;
a row's figures are the largest over ranks.  Each GPU has as many experts as in the one-GPU rows, so the work per GPU is
the same and `one_rank_us` is what the call takes when nothing goes over NVLink.  The
unfused layer is that of `unfused_run`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import megamoe_jit
from megamoe_jit._bench.clock import SUSTAINED_S, TimedCall, anchors
from megamoe_jit._bench.conditions import environment
from megamoe_jit._bench.contenders import METHODS
from megamoe_jit._bench.measure import as_fp8, kernel_of, require_hopper, some_rows
from megamoe_jit._bench.on_ranks import RankTimer, RankWeights, measured_on_ranks, shape_on_ranks, sizes_of
from megamoe_jit._bench.rows import rows_of
from megamoe_jit._bench.unfused import Task
from megamoe_jit._bench.unfused_run import add_baselines, unusable
from megamoe_jit._check.scenarios import Inputs, Scenario, make_inputs
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import buffer_sizes, function_of, judge
from megamoe_jit._documents import content
from megamoe_jit._layer.group import gather
from megamoe_jit._spec import FP8, MAX_RANKS, MoEShape
from megamoe_jit._spec.checks import check
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.reference import calc_diff, expert_counts

MAX_SUSTAINED = 2000  #: calls


class _Layer(RankWeights):
    """One shape on this rank: weights, a buffer of all ranks and one of this rank alone."""

    def __init__(self, world: World, shape: MoEShape, max_tokens: int, weights: str) -> None:
        import torch.distributed as dist

        super().__init__(world, shape, weights)
        self.buffer, self.own_buffer = (
            megamoe_jit.get_symm_buffer_for_mega_moe(group, *buffer_sizes(each, max_tokens), device=world.device)
            for group, each in ((dist.group.WORLD, shape), (None, self.own_shape))
        )

    def call(self, buffer: Any, inputs: Inputs, variant: str, y: torch.Tensor, case: Scenario) -> TimedCall:
        function = function_of(megamoe_jit, variant)

        def run() -> object:
            return function(y, self.l1, self.l2, buffer, **case.options)

        return TimedCall(run, lambda: inputs.stage(buffer))

    def destroy(self) -> None:
        self.buffer.destroy()
        self.own_buffer.destroy()


def _measure(
    world: World, layer: _Layer, timer: RankTimer, case: Scenario, variants: Sequence[str], methods: Mapping[str, str]
) -> dict[str, Any]:
    """One case on this rank: times by name, and what else is needed for the rows."""
    import torch.distributed as dist

    inputs = make_inputs(case, layer.device, world.rank, layer.weights)
    own_case = Scenario(case.name, layer.own_shape, case.tokens, case.tokens, weights=case.weights)
    own_inputs = make_inputs(own_case, layer.device, world.rank, layer.own)
    y = torch.empty(case.tokens, case.shape.hidden, dtype=torch.bfloat16, device=layer.device)
    where, expected = some_rows(case, inputs, layer.weights)
    own_where, own_expected = some_rows(own_case, own_inputs, layer.own)
    calls: dict[str, TimedCall] = {}
    verdicts: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}

    def add(name: str, buffer: Any, its: Inputs, rows: torch.Tensor, reference: torch.Tensor, variant: str) -> None:
        calls[name] = layer.call(buffer, its, variant, y, case)
        y.fill_(float("nan"))
        calls[name].stage()
        calls[name].run()
        buffer.check()
        verdicts[variant].append(asdict(judge(y[rows], reference)))

    for variant in variants:
        add(variant, layer.buffer, inputs, where, expected, variant)
        calls[f"{variant} staged"] = calls[variant].staged()
        add(f"one {variant}", layer.own_buffer, own_inputs, own_where, own_expected, variant)
    task = Task(inputs, as_fp8(layer.own), case.shape.experts, case.clamp, dist.group.WORLD)
    baselines = add_baselines(calls, methods, task, lambda out: calc_diff(out[where], expected))
    times = timer.burst(calls)
    sustained = {}
    for variant in variants:
        slowest = max(gather(dist.group.WORLD, statistics.median(times[variant])))
        count = max(4, min(MAX_SUSTAINED, int(SUSTAINED_S * 1e6 / slowest)))
        sustained[variant] = timer.sustained(calls[variant], count)
    layer.buffer.check()
    return {
        "times": times,
        "verdicts": verdicts,
        "sustained": sustained,
        "expert_rows": expert_counts(inputs.topk_idx, case.shape.experts).tolist(),
        "baselines": baselines,
    }


def measure_on_rank(
    world: World,
    shapes: list[list[Any]],
    tokens: list[int],
    variants: list[str],
    baseline: bool,
    weights: str = FP8.name,
) -> dict[str, Any]:
    """What each rank does: all cases, in the same order; rank 0 reports each when all ranks have it."""
    import torch.distributed as dist

    require_hopper()
    conditions = environment()
    card = [anchors()]
    timer = RankTimer(world.device)
    methods = {method.name: "not wanted" for method in METHODS}
    if baseline:
        methods = unusable(world.device, dist.group.WORLD)
    baselines: list[dict[str, Any]] = []
    for name, *sizes in shapes:
        torch.cuda.empty_cache()
        layer = _Layer(world, shape_on_ranks(world, *sizes), max(tokens), weights)
        for count in sorted(tokens):
            case = Scenario(name, layer.shape, count, count, weights=weights)
            wanted = case.runs(variants)
            parts = gather(dist.group.WORLD, _measure(world, layer, timer, case, wanted, methods))
            if world.rank == 0:
                where = world.device, world.ranks, weights
                kernels = {v: kernel_of(case.shape, case.tokens, v, *where) for v in wanted}
                rows, others = rows_of(case, kernels, parts)
                baselines += map(asdict, others)
                for row in rows:
                    world.report(content(row))
        layer.destroy()
        del layer
    not_timed = {name: reason for name, reason in methods.items() if reason}
    found = {"environment": conditions, "anchors": [*card, anchors()]}
    return {**found, "baselines": baselines, "baselines_not_timed": not_timed}


def run(
    presets: Iterable[Preset],
    tokens: Sequence[int],
    variants: Sequence[str],
    ranks: int,
    *,
    baseline: bool = True,
    weights: str = FP8.name,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Measure on several GPUs: those of torchrun if there is one, else with ranks started here.

    Args:
        presets: shapes; each GPU gets the experts of one of their ranks.
        tokens: per GPU.
        variants: names from `VARIANT_CHOICES`.
        ranks: how many GPUs.
        baseline: time the unfused layer too.
        weights: the format of the weights.
        progress: called with each row as it is measured.

    Returns:
        Conditions, anchors, rows and baselines, as in a document of `bench`; None on the ranks of torchrun that have
        nothing to say.

    Raises:
        ConfigError: there are not as many GPUs.
        UnsupportedDeviceError: there is none at all.
        MegaMoeError: a rank failed; says what all of them said.
    """
    check(2 <= ranks <= MAX_RANKS, "ranks", ranks, f"2 to {MAX_RANKS}")
    if not torch.cuda.is_available():  # otherwise each rank asks for itself: this process needs no CUDA context
        require_hopper()
    arguments = {"shapes": [*map(sizes_of, presets)], "tokens": list(tokens), "variants": list(variants)}
    arguments |= {"baseline": baseline, "weights": weights}
    return measured_on_ranks("megamoe_jit._bench.measure_ranks:measure_on_rank", ranks, arguments, progress)
