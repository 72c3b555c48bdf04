"""Scenarios on several ranks: each rank has inputs of its own and judges its own tokens.

Every rank draws all experts' weights from one seed, so the oracle needs nothing from the code that is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from megamoe_jit._check import scenarios as _scenarios
from megamoe_jit._check.collect import collect
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import (
    FAULTS,
    GUARD_ROWS,
    STATS_BEFORE,
    VARIANTS,
    Outcome,
    WeightCache,
    _stage,
    function_of,
    judge,
)
from megamoe_jit._errors import ConfigError, MegaMoeError
from megamoe_jit.reference import expert_counts, moe_reference

__all__ = ["chosen", "run_on_rank", "run_ranks"]

SEEDS_PER_RUN = 64  #: rank r of a run with seed s has inputs of seed s * 64 + r
COLLECTIVE_S = 120.0


def chosen(pattern: str, ranks: int, *, slow: bool = False) -> tuple[Scenario, ...]:
    """Scenarios that fit the pattern and whose experts the ranks can share evenly, by shape.

    Raises:
        ConfigError: there is none.
    """
    fitting = [s for s in _scenarios.select(pattern, slow=slow) if s.shape.experts % ranks == 0]
    if not fitting:
        raise ConfigError(f"no scenario of {pattern!r} has experts that {ranks} ranks can share evenly")
    by_shape = {s.shape: i for i, s in reversed(list(enumerate(fitting)))}
    return tuple(sorted(fitting, key=lambda s: by_shape[s.shape]))


def _one(world: World, scenario: Scenario, variant: str, seed: int, cache: WeightCache, api: Any) -> Outcome:
    import torch.distributed as dist

    s, device, group = scenario.shape, world.device, dist.group.WORLD
    local = s.experts // world.ranks
    mine = slice(world.rank * local, (world.rank + 1) * local)
    entry = cache.get(s, device, seed, api)
    inputs = _scenarios.make_inputs(scenario, device, seed * SEEDS_PER_RUN + world.rank, entry.weights)
    l1, l2 = ((codes[mine], scales[mine]) for codes, scales in (entry.l1, entry.l2))
    y = torch.full((scenario.tokens + GUARD_ROWS, s.hidden), math.nan, dtype=torch.bfloat16, device=device)
    stats = torch.full((local,), STATS_BEFORE, dtype=torch.int32, device=device)
    buffer = api.get_symm_buffer_for_mega_moe(group, s.experts, scenario.capacity, s.topk, s.hidden, s.intermediate)
    _stage(buffer, inputs, s.experts)
    function_of(api, variant)(
        y[: scenario.tokens],
        l1,
        l2,
        buffer,
        stats,
        activation_clamp=scenario.clamp,
        fast_math=scenario.fast_math,
    )
    buffer.check()
    buffer.destroy()
    w = entry.weights
    ids, router = inputs.topk_idx, inputs.topk_weights
    expected = moe_reference(inputs.x_q, inputs.x_sf, ids, router, w.l1, w.l2, activation_clamp=scenario.clamp)
    verdict = judge(y[: scenario.tokens], expected)
    problems = [verdict.reason] if verdict.reason else []
    if not y[scenario.tokens :].isnan().all():
        problems.append("rows past the token count were written")
    counts = expert_counts(ids, s.experts).to("cpu", torch.int64)
    dist.all_reduce(counts)
    wrong = (stats.to("cpu", torch.int64) != counts[mine] + STATS_BEFORE).nonzero()
    if len(wrong):
        problems.append(f"the counter of expert {mine.start + int(wrong[0])} is wrong")
    zeros = verdict.zero_rows_ok
    reason = "; ".join(problems)
    return Outcome(scenario.name, variant, verdict.diff, verdict.worst_row_diff, zeros, not problems, reason)


def _merged(outcomes: Sequence[Outcome]) -> Outcome:
    """All ranks' outcomes of one scenario and variant as one: the worst of each figure."""
    first = outcomes[0]

    def worst(values: list[float]) -> float:
        return math.nan if any(map(math.isnan, values)) else max(values)

    return Outcome(
        first.name,
        first.variant,
        worst([o.diff for o in outcomes]),
        worst([o.worst_row_diff for o in outcomes]),
        all(o.zero_rows_ok for o in outcomes),
        all(o.passed for o in outcomes),
        "; ".join(f"rank {rank}: {o.reason}" for rank, o in enumerate(outcomes) if o.reason),
    )


def run_on_rank(
    world: World, pattern: str, variants: list[str], slow: bool, seed: int, api: str = "megamoe_jit"
) -> int:
    """What each rank does; rank 0 reports every merged outcome as it comes.

    Returns:
        How many outcomes there were.  An error of any rank ends the run: the ranks may no longer be in step.
    """
    from datetime import timedelta

    import torch.distributed as dist

    # a rank that raised in the middle of a collective meets the others here
    control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * COLLECTIVE_S))
    module, cache, count = import_module(api), WeightCache(), 0
    for scenario in chosen(pattern, world.ranks, slow=slow):
        for variant in variants:
            fatal = False
            try:
                outcome = _one(world, scenario, variant, seed, cache, module)
            except (MegaMoeError, RuntimeError) as error:
                fatal = not isinstance(error, ConfigError)
                reason = f"{type(error).__name__}: {error}"
                outcome = Outcome(scenario.name, variant, math.nan, math.nan, False, False, reason)
            everyone: list[Any] = [None] * world.ranks
            dist.all_gather_object(everyone, (outcome, fatal), group=control)
            count += 1
            if world.rank == 0:
                world.report(_merged([each for each, _ in everyone]).to_json())
            if any(stop for _, stop in everyone):
                return count
    return count


def _from_json(data: dict[str, Any]) -> Outcome:
    values: dict[str, Any] = {k: math.nan if v is None else v for k, v in data.items()}
    return Outcome(**values)


def run_ranks(
    ranks: int,
    pattern: str = "*",
    variants: Sequence[str] = VARIANTS,
    progress: Callable[[Outcome], None] | None = None,
    *,
    slow: bool = False,
    seed: int = 0,
    device: str = "cuda",
    api: str = "megamoe_jit",
) -> list[Outcome] | None:
    """Run every scenario that fits on all ranks: those of torchrun if there is one, else started here.

    Args:
        ranks: how many.
        pattern: as in `scenarios.select`.
        variants: ``auto`` or names of variants.
        progress: called with each outcome as it comes.
        slow: slow scenarios as well.
        seed: of weights and inputs.
        device: `cuda`, or `cpu` in tests of this runner.
        api: module that stands in for the package in tests of this runner.

    Returns:
        Outcomes, each the worst over ranks; None on the ranks of torchrun that have nothing to say.

    Raises:
        ConfigError: no scenario fits, or there are fewer GPUs.
        MegaMoeError: a rank ended without saying why.
    """
    chosen(pattern, ranks, slow=slow)  # refuses before anything is started
    outcomes: list[Outcome] = []

    def note(_: int, report: Any) -> None:
        outcomes.append(_from_json(report))
        if progress is not None:
            progress(outcomes[-1])

    arguments = {"pattern": pattern, "variants": list(variants), "slow": slow, "seed": seed, "api": api}
    target = "megamoe_jit._check.verify_ranks:run_on_rank"
    try:
        done = collect(target, ranks, arguments, device=device, on_report=note, group_timeout_s=COLLECTIVE_S)
    except MegaMoeError:
        if not outcomes or outcomes[-1].passed or not any(name.__name__ in outcomes[-1].reason for name in FAULTS):
            raise
        return outcomes  # a broken CUDA context may spoil how a rank ends; what happened has been said
    return None if done is None else outcomes
