"""What ranks check about single calls: the scenario table, ragged token counts, routes between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from megamoe_jit._check.scenarios import SCENARIOS, Inputs, Scenario
from megamoe_jit._check.spawn import World
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from tests.multi.worker import CLAMP, MODES, Rank, equal_bits, layer, shape_for, variant_of

CAPACITY = 512
SIZES = (1024, 768, 16, 4)  #: hidden, intermediate, experts, top-k of the checks that are not in the table
PRIMES = (131, 257, 7, 509, 61, 2, 383, 191)

#: Tokens by rank and number of ranks.
RAGGED: dict[str, Callable[[int, int], int]] = {
    "first none, others full": lambda rank, ranks: CAPACITY if rank else 0,
    "last none, others full": lambda rank, ranks: CAPACITY if rank < ranks - 1 else 0,
    "first one, others full": lambda rank, ranks: CAPACITY if rank else 1,
    "last one, others full": lambda rank, ranks: CAPACITY if rank < ranks - 1 else 1,
    "primes": lambda rank, ranks: PRIMES[rank],
    "both sides of the heuristic's threshold": lambda rank, ranks: 255 + rank % 2,
    "none anywhere": lambda rank, ranks: 0,
    "one anywhere": lambda rank, ranks: 1 if rank == ranks - 1 else 0,
    "full": lambda rank, ranks: CAPACITY,
}
#: Routes of the table, and those that only ranks have.
ROUTES = ("topk", "lognormal", "powerlaw:1.2", "hot", "single", "duplicate", "balanced")
OWN_ROUTES = ("first rank", "last rank", "next rank", "all remote", "all local", "all masked")


def between_ranks(inputs: Inputs, route: str, rank: int, ranks: int, experts: int) -> Inputs:
    """The same inputs, their tokens sent to the experts of chosen ranks."""
    local = experts // ranks
    shape, device = inputs.topk_idx.shape, inputs.topk_idx.device
    gen = torch.Generator(device=device).manual_seed(rank)
    inside = torch.randint(local, shape, generator=gen, device=device)
    hops = torch.randint(1, ranks, shape, generator=gen, device=device)
    owner = {
        "first rank": torch.zeros_like(inside),
        "last rank": torch.full_like(inside, ranks - 1),
        "next rank": torch.full_like(inside, (rank + 1) % ranks),
        "all remote": (rank + hops) % ranks,
        "all local": torch.full_like(inside, rank),
        "all masked": torch.zeros_like(inside),
    }[route]
    ids = torch.full_like(inside, -1) if route == "all masked" else owner * local + inside
    return replace(inputs, topk_idx=ids)


def _check_modes(it: Rank, inputs: Inputs, clamp: float | None = 10.0, fast_math: bool = True) -> str:
    expected = it.expected(inputs, clamp)
    problems = [it.check(inputs, mode, expected=expected, clamp=clamp, fast_math=fast_math) for mode in MODES]
    return "; ".join(problem for problem in problems if problem)


def check_scenario(scenario: Scenario, world: World) -> str:
    """A scenario of the table on every rank, each with inputs of its own; staged by the caller, and by kernels."""
    it = layer(world, scenario.shape, scenario.capacity)
    inputs, clamp, fast_math = it.inputs(scenario), scenario.clamp, scenario.fast_math
    problems = _check_modes(it, inputs, clamp, fast_math), _check_staging(it, inputs, clamp, fast_math)
    return "; ".join(filter(None, problems))


def _check_staging(it: Rank, inputs: Inputs, clamp: float | None = CLAMP, fast_math: bool = True) -> str:
    """Staged in the launch by all ranks, by some, by none; the same bits as where the caller stages."""
    wanted, problems = it.run(inputs, clamp=clamp, fast_math=fast_math), []
    for name, raw in (("all", True), ("some", it.rank % 2 == 0), ("none", False)):
        it.poison()
        batch = (inputs.x if raw else inputs.x.float(), inputs.topk_idx, inputs.topk_weights)
        y = mega_moe_from_bf16(*batch, it.l1, it.l2, it.buffer, activation_clamp=clamp, fast_math=fast_math)
        it.buffer.check()
        if not equal_bits(y, wanted):
            problems.append(f"{len(y)} tokens, staged in the launch by {name}: other bits")
    return "; ".join(problems)


def own_layer(world: World) -> Rank:
    """The layer of the checks that are not in the table."""
    return layer(world, shape_for(world.ranks, *SIZES), CAPACITY)


def check_ragged(name: str, route: str, world: World) -> str:
    """Different token counts on the ranks."""
    it = own_layer(world)
    return _check_modes(it, it.some(RAGGED[name](world.rank, world.ranks), route=route))


def check_route(route: str, world: World) -> str:
    """A route between ranks, at a small and at a large token count."""
    it, problems = own_layer(world), []
    for tokens in (33 + world.rank, CAPACITY - world.rank):
        if route in OWN_ROUTES:
            inputs = between_ranks(it.some(tokens), route, world.rank, world.ranks, it.shape.experts)
        else:
            inputs = it.some(tokens, route=route)
        problems.append(_check_modes(it, inputs))
    return "; ".join(problem for problem in problems if problem)


def check_auto(world: World) -> str:
    """The heuristics choose; ranks on the two sides of the threshold choose differently."""
    it, problems = own_layer(world), []
    for tokens in (40 + 400 * (world.rank % 2), 440 - 400 * (world.rank % 2)):
        inputs = it.some(tokens)
        problems.append(it.judge(inputs, it.run(inputs, variant="auto")))
    return "; ".join(problem for problem in problems if problem)


def check_some_sms(world: World) -> str:
    """Different numbers of blocks on the ranks; the same bits."""
    it, problems = own_layer(world), []
    inputs = it.some(300)
    for mode in MODES:
        variant = variant_of(mode, world.rank)
        whole = it.run(inputs, variant=variant)
        for sms in ((1, 37, 2, 131)[world.rank % 4], 100 - world.rank):
            if not torch.equal(whole, it.run(inputs, variant=variant, num_sms=sms)):
                problems.append(f"{mode}: other bits with {sms} blocks")
    return "; ".join(problems)


def check_from_bf16(world: World) -> str:
    """Batches of another size on each rank, small and large."""
    it = own_layer(world)
    return "; ".join(filter(None, (_check_staging(it, it.some(n)) for n in (33 + it.rank, CAPACITY - it.rank))))


def by_shape() -> list[Scenario]:
    """The table, equal shapes next to each other."""
    first = {s.shape: i for i, s in reversed(list(enumerate(SCENARIOS)))}
    return sorted(SCENARIOS, key=lambda s: (first[s.shape], s.capacity, not s.fast_math))


CHECKS: dict[str, Callable[[World], str]] = {
    **{scenario.name: partial(check_scenario, scenario) for scenario in by_shape()},
    **{f"ragged: {n}, {r}": partial(check_ragged, n, r) for n in RAGGED for r in ("topk", "powerlaw:1.2")},
    **{f"route: {route}": partial(check_route, route) for route in (*ROUTES, *OWN_ROUTES)},
    "heuristics on both sides": check_auto,
    "different numbers of SMs": check_some_sms,
    "from bf16": check_from_bf16,
}
