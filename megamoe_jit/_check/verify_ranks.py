"""Scenarios on several ranks: each rank has inputs of its own and judges its own tokens.

Each may be run several times on one buffer, with inputs of each time, and each rank may be late for each launch by a
time of chance: ranks that always come together hide what is wrong with how they wait for each other.

Every rank draws all experts' weights from one seed, so the oracle needs nothing from the code that is judged.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch

from megamoe_jit._check import scenarios as _scenarios
from megamoe_jit._check.collect import collect
from megamoe_jit._check.documents import Outcome
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import (
    FAULTS,
    GUARD_ROWS,
    STATS_BEFORE,
    Runs,
    WeightCache,
    buffer_sizes,
    expected_of,
    failure,
    function_of,
    is_gone,
    outcome_of,
    stage_with_guards,
)
from megamoe_jit._errors import MegaMoeError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.group import collectively
from megamoe_jit._layer.weights import mark_transformed
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import expert_counts

SEEDS_PER_RUN = 64  #: rank r of a run with seed s has inputs of seed s * 64 + r, and in round n of n * 2 ** 32 more
CYCLES_PER_US = 1800  #: of the SMs, about
COLLECTIVE_S = 120.0


def share_of(given: WeightTensors, shape: MoEShape, rank: int, ranks: int) -> WeightTensors:
    """A rank's part of all experts' codes and scales: its share of the routed ones, and all that are shared."""
    local = shape.experts // ranks
    mine = tuple(tensor[rank * local : (rank + 1) * local] for tensor in given)
    if not shape.shared:
        return mine
    return tuple(
        torch.cat((own.view(torch.uint8), tensor[-shape.shared :].view(torch.uint8))).view(tensor.dtype)
        for own, tensor in zip(mine, given, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _Said:
    """What a rank says of one scenario and variant, to all others."""

    outcome: Outcome
    gone: bool  #: the CUDA context, or the process group, and with it the ranks' step
    has_buffer: bool
    sent: list[int]  #: rows to each expert of all ranks
    counters: list[int]  #: what the kernel counted for each expert of this rank; empty if it did not run


class _Rank:
    """One rank's runs; the ranks meet before and after each, so one that fails between keeps no other waiting."""

    def __init__(self, world: World, seed: int, api: Any, skew_us: int = 0) -> None:
        self.world, self._seed, self._api, self._cache = world, seed, api, WeightCache()
        self._skew_us = skew_us
        self._buffer: Any = None

    def run(self, scenario: Scenario, variant: str, number: int = 0) -> _Said:
        """Run a round and judge; whatever it raises is what it says. The buffer stays until `destroy`."""
        try:
            return self._run(scenario, variant, number)
        except Exception as error:
            outcome = failure(scenario, variant, error)
            return _Said(outcome, is_gone(error, self.world.device), self._buffer is not None, [], [])

    def destroy(self) -> None:
        """Give the buffer of the last run back. Collective."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.destroy()

    def _come_late(self, *what: object) -> None:
        """Let the stream rest, for a time of chance that is another one on each rank."""
        late_us = random.Random(f"{self._seed} {self.world.rank} {what}").uniform(0, self._skew_us)
        if self.world.device.type == "cuda":
            vars(torch.cuda)["_sleep"](int(late_us * CYCLES_PER_US))
        else:
            time.sleep(late_us * 1e-6)

    def _run(self, scenario: Scenario, variant: str, number: int) -> _Said:
        import torch.distributed as dist

        s, api, world = scenario.shape, self._api, self.world
        device, local = world.device, s.experts // world.ranks

        def draw() -> tuple[Any, _scenarios.Inputs]:
            entry = self._cache.get(scenario, device, self._seed, api)
            seed = self._seed * SEEDS_PER_RUN + world.rank + (number << 32)
            return entry, _scenarios.make_inputs(scenario, device, seed, entry.weights)

        entry, inputs = collectively(dist.group.WORLD, "drawing weights and inputs", draw)
        l1, l2 = (share_of(pair, s, world.rank, world.ranks) for pair in (entry.l1, entry.l2))
        if s.shared:  # those are copies
            mark_transformed(l1, l2)
        y = torch.full((scenario.tokens + GUARD_ROWS, s.hidden), math.nan, dtype=torch.bfloat16, device=device)
        stats = torch.full((local,), STATS_BEFORE, dtype=torch.int32, device=device)
        if number == 0:
            self._buffer = api.get_symm_buffer_for_mega_moe(dist.group.WORLD, *buffer_sizes(s, scenario.capacity))
        buffer = self._buffer
        stage_with_guards(buffer, inputs, s.experts)
        self._come_late(scenario.name, variant, number)
        function_of(api, variant)(y[: scenario.tokens], l1, l2, buffer, stats, **scenario.options)
        buffer.check()
        outcome = outcome_of(scenario, variant, y, expected_of(scenario, inputs))
        return _Said(outcome, False, True, expert_counts(inputs.topk_idx, s.experts).tolist(), stats.tolist())


def _counted(everyone: Sequence[_Said]) -> list[Outcome]:
    """The ranks' outcomes, with what is wrong of their counters; these count the rows that all ranks send."""
    outcomes = [said.outcome for said in everyone]
    if not all(said.counters for said in everyone):  # some rank has failed, which says more
        return outcomes
    total = [sum(sent) + STATS_BEFORE for sent in zip(*(said.sent for said in everyone), strict=True)]
    first = 0
    for rank, said in enumerate(everyone):
        wrong = [e for e, counted in enumerate(said.counters, first) if counted != total[e]]
        first += len(said.counters)
        if wrong:
            outcomes[rank] = outcomes[rank].also(f"the counter of expert {wrong[0]} is wrong")
    return outcomes


def _merged(outcomes: Sequence[Outcome], each: str = "rank") -> Outcome:
    """The outcomes of one scenario and variant, of all ranks or of all rounds, as one: the worst of each figure."""
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
        "; ".join(f"{each} {number}: {o.reason}" for number, o in enumerate(outcomes) if o.reason),
        first.weights,
    )


def run_on_rank(world: World, runs: dict[str, Any], api: str = "megamoe_jit") -> int:
    """What each rank does; rank 0 reports every merged outcome as it comes. A round that fails is its scenario's last.

    Args:
        world: this rank's place.
        runs: a `Runs` as plain data.
        api: module that stands in for the package in tests of this runner.

    Returns:
        How many outcomes there were. One that fails does not keep the others from being run, but a rank that has lost
        its CUDA context, or the process group, ends the run.
    """
    from datetime import timedelta

    import torch.distributed as dist

    # a rank that raised in the middle of a collective meets the others here
    control: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * COLLECTIVE_S))
    wanted = Runs(**runs)
    rank, count = _Rank(world, wanted.seed, import_module(api), wanted.skew_us), 0
    for scenario in wanted.chosen(world.ranks):
        for variant in scenario.runs(wanted.variants):
            outcomes: list[Outcome] = []
            everyone: list[Any] = [None] * world.ranks
            while len(outcomes) < wanted.rounds and all(o.passed for o in outcomes):
                dist.all_gather_object(everyone, rank.run(scenario, variant, len(outcomes)), group=control)
                outcomes.append(_merged(_counted(everyone)))
            count += 1
            if world.rank == 0:
                world.report(asdict(_merged(outcomes, "round") if wanted.rounds > 1 else outcomes[0]))
            if any(said.gone for said in everyone):
                return count
            if all(said.has_buffer for said in everyone):
                rank.destroy()
    return count


def run_ranks(
    ranks: int,
    runs: Runs,
    progress: Callable[[Outcome], None] = lambda _: None,
    *,
    device: str = "cuda",
    api: str = "megamoe_jit",
) -> list[Outcome] | None:
    """Run every scenario that fits on all ranks: those of torchrun if there is one, else started here.

    Args:
        ranks: how many.
        runs: which scenarios, and how.
        progress: called with each outcome as it comes.
        device: `cuda`, or `cpu` in tests of this runner.
        api: module that stands in for the package in tests of this runner.

    Returns:
        Outcomes, each the worst over ranks and rounds; None on the ranks of torchrun that have nothing to say.

    Raises:
        ConfigError: no scenario fits, or there are fewer GPUs.
        MegaMoeError: a rank ended without saying why.
    """
    runs.chosen(ranks)  # refuses before anything is started
    outcomes: list[Outcome] = []

    def note(_: int, report: Any) -> None:
        outcomes.append(Outcome(**report))
        progress(outcomes[-1])

    arguments = {"runs": asdict(runs), "api": api}
    target = "megamoe_jit._check.verify_ranks:run_on_rank"
    try:
        done = collect(target, ranks, arguments, device=device, on_report=note, group_timeout_s=COLLECTIVE_S)
    except MegaMoeError:
        if not outcomes or outcomes[-1].passed or not any(name.__name__ in outcomes[-1].reason for name in FAULTS):
            raise
        return outcomes  # a broken CUDA context may spoil how a rank ends; what happened has been said
    return None if done is None else outcomes
