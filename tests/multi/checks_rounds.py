"""What ranks check about many calls: soak, stalls, graphs, several buffers, counters."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch

import megamoe_jit as mm
from megamoe_jit._check.spawn import World
from tests.multi.checks_scenarios import CAPACITY, own_layer
from tests.multi.worker import MIXED, MODES, Rank, equal_bits, layer, shape_for, variant_of

ROUNDS = 300
SOAK_SIZES = (0, 1, 7, 64, 131, 200, 257, 512)
STALL_CYCLES = 180_000_000  #: about 100 ms
UNPREPARED = (384, 256, 24, 3)  #: no other check has this layer
OTHER = (512, 512, 8, 2)
RING_TOKENS = 3000


def check_soak(world: World) -> str:
    """Rounds of random sizes, variants and delays without synchronising; the same inputs always give the same bits."""
    it = own_layer(world)
    pool = {(t, seed): it.some(t, seed, route=("topk", "hot")[seed]) for t in SOAK_SIZES for seed in (0, 1)}
    mine = random.Random(world.rank)
    first: dict[tuple[int, int], tuple[torch.Tensor, str]] = {}
    compared: list[tuple[str, torch.Tensor]] = []
    for number in range(ROUNDS):
        key = mine.choice(list(pool))
        variant = mine.choice(MIXED)
        if mine.random() < 0.3:
            torch.cuda._sleep(mine.randint(1, 4_000_000))  # up to 2 ms on the stream
        if mine.random() < 0.1:
            time.sleep(mine.random() * 0.01)
        y = it.run(pool[key], variant=variant)
        if key in first:
            text = f"round {number}: {key} with {variant} has other bits than with {first[key][1]} at first"
            compared.append((text, (y.view(torch.int16) != first[key][0].view(torch.int16)).any()))
        else:
            first[key] = (y, variant)
        if mine.random() < 0.05:
            it.buffer.check()
    it.buffer.check()
    problems = [text for text, differs in compared if differs]
    for key, (y, variant) in first.items():
        wrong = it.judge(pool[key], y)
        if wrong:
            problems.append(f"{key} with {variant}: {wrong}")
    return f"{len(problems)} of {ROUNDS} rounds: {'; '.join(problems[:4])}" if problems else ""


def check_stalls(mode: str, world: World) -> str:
    """Eight rounds, each with another rank late by 100 ms; the same bits."""
    it = own_layer(world)
    inputs = it.some(200 + 37 * world.rank, route="powerlaw:1.2")
    variant = variant_of(mode, world.rank)
    expected = it.run(inputs, variant=variant)
    problems = [it.judge(inputs, expected)]
    for number in range(8):
        if number % world.ranks == world.rank:
            torch.cuda._sleep(STALL_CYCLES)
        if not equal_bits(it.run(inputs, variant=variant), expected):
            problems.append(f"round {number}: other bits")
    return "; ".join(problem for problem in problems if problem)


def _capture(it: Rank, tokens: int, **more) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    y, graph = it.poisoned(tokens), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        it.call(tokens, y=y, **more)
    return graph, y


def _replay(it: Rank, graph: torch.cuda.CUDAGraph, y: torch.Tensor, inputs) -> torch.Tensor:
    it.stage(inputs)
    y.fill_(float("nan"))
    graph.replay()
    return y


def check_graphs(world: World) -> str:
    """Two captured sizes on each rank, replayed with changing inputs, with eager calls of other sizes in between."""
    it, problems = own_layer(world), []
    for variant in MIXED:
        it.buffer.prepare(variant)
    sizes = (64 + 3 * world.rank, 300 - 17 * world.rank)
    sets = {t: [it.some(t, seed) for seed in range(4)] for t in sizes}
    eager = {t: [it.run(inputs) for inputs in sets[t]] for t in sizes}
    problems += [it.judge(sets[t][0], eager[t][0]) for t in sizes]
    graphs = {t: _capture(it, t) for t in sizes}
    between = it.some(CAPACITY - 40 * world.rank, 9)
    expected = it.run(between)
    for number in range(3):
        for which in range(4):
            for t in sizes:
                if which == (number + world.rank) % 4:
                    torch.cuda._sleep(1_000_000 * (1 + number))
                y = _replay(it, *graphs[t], sets[t][which])
                if not equal_bits(y, eager[t][which]):
                    problems.append(f"replay {number} of {t} tokens, inputs {which}: other bits than eager")
            if not equal_bits(it.run(between), expected):
                problems.append(f"the eager call after replay {number}.{which}: other bits")
    return "; ".join(problem for problem in problems if problem)


def check_graph_on_some(world: World) -> str:
    """In every round some ranks replay and the others call eagerly."""
    it, problems = own_layer(world), []
    tokens = 90 + 11 * world.rank
    sets = [it.some(tokens, seed) for seed in range(4)]
    eager = [it.run(inputs) for inputs in sets]
    graph, captured = _capture(it, tokens)
    for number in range(12):
        which = number % 4
        replays = (number + world.rank) % 2 == 0
        y = _replay(it, graph, captured, sets[which]) if replays else it.run(sets[which])
        if not equal_bits(y, eager[which]):
            problems.append(f"round {number}: other bits {'replayed' if replays else 'eager'}")
    return "; ".join(problems)


def check_replays_in_a_row(world: World) -> str:
    """Replays without staging or synchronising in between, ranks late in turn; the counters count each."""
    it = own_layer(world)
    inputs = it.some(150 + world.rank)
    expected, stats = it.run(inputs), it.new_stats()
    graph, y = _capture(it, 150 + world.rank, stats=stats)
    for number in range(40):
        if number % (world.ranks + 3) == world.rank:
            torch.cuda._sleep(3_000_000)
        graph.replay()
    it.buffer.check()
    wanted = 40 * it.counts(inputs)
    problems = [] if equal_bits(y, expected) else ["other bits"]
    if not torch.equal(stats.cpu().to(torch.int64), wanted):
        problems.append(f"counters are {stats.tolist()}, must be {wanted.tolist()}")
    return "; ".join(problems)


def check_capture_unprepared(world: World) -> str:
    """A capture of a kernel that is not prepared is refused on every rank, and harms nothing."""
    it = layer(world, shape_for(world.ranks, *UNPREPARED), 64)
    inputs = it.some(20 + world.rank)
    it.stage(inputs)
    tokens, problems = 20 + world.rank, []
    marker, y, graph = torch.zeros(1, device=it.device), it.poisoned(tokens), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        marker.add_(1)
        try:
            it.call(tokens, y=y, variant="pingpong")
            problems.append("the capture was not refused")
        except mm.CaptureError as error:
            if "prepare" not in str(error):
                problems.append(f"does not name prepare(): {error}")
        marker.add_(1)
    graph.replay()
    if marker.item() != 2 or not y.isnan().all():
        problems.append("the capture did not go on")
    expected = it.run(inputs, variant="pingpong")
    problems.append(it.judge(inputs, expected))
    graph, y = _capture(it, tokens, variant="pingpong")
    if not equal_bits(_replay(it, graph, y, inputs), expected):
        problems.append("captured after preparing: other bits")
    return "; ".join(problem for problem in problems if problem)


def check_two_buffers(world: World) -> str:
    """Two buffers of one layer and one of another, used in turn."""
    it, problems = own_layer(world), []
    other = Rank(world.rank, world.ranks, world.device, shape_for(world.ranks, *OTHER), 130)
    ours, theirs = it.some(260 + world.rank, 1), other.some(130 - 50 * (world.rank % 2), 2)
    second = it.make_buffer(300)
    expected = it.run(ours)
    problems.append(it.judge(ours, expected))
    expected_other = other.run(theirs)
    problems.append(other.judge(theirs, expected_other))
    for number in range(6):
        if number % world.ranks == world.rank:
            torch.cuda._sleep(2_000_000)
        results = [it.run(ours, buffer=second), other.run(theirs), it.run(ours)]
        for what, y, wanted in zip(
            ("the second", "the other layer's", "the first"), results, (expected, expected_other, expected), strict=True
        ):
            if not equal_bits(y, wanted):
                problems.append(f"round {number}, {what} buffer: other bits")
    second.destroy()
    other.buffer.destroy()
    if not equal_bits(it.run(ours), expected):
        problems.append("after the others are destroyed: other bits")
    return "; ".join(problem for problem in problems if problem)


def check_ring(world: World) -> str:
    """Pools that are rings on some ranks or on all: the same bits as with pools for everything."""
    it, problems = own_layer(world), []
    whole = it.make_buffer(RING_TOKENS)
    rings = it.make_buffer(RING_TOKENS, max_pool_rows=4096)
    some = it.make_buffer(RING_TOKENS, max_pool_rows=4096 if world.rank % 2 else 65536)
    for seed, route in enumerate(("topk", "single", "powerlaw:1.2")):
        inputs = it.some(RING_TOKENS - 77 * world.rank, seed, route=route)
        for mode in MODES:
            variant = variant_of(mode, world.rank)
            expected = it.run(inputs, buffer=whole, variant=variant)
            problems.append(it.judge(inputs, expected))
            for what, buffer in (("rings", rings), ("rings on some ranks", some)):
                if not equal_bits(it.run(inputs, buffer=buffer, variant=variant), expected):
                    problems.append(f"{route}, {mode}, {what}: other bits")
    for buffer in (whole, rings, some):
        buffer.check()
        buffer.destroy()
    return "; ".join(problem for problem in problems if problem)


def _free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def check_recreate(world: World) -> str:
    """Buffers made and destroyed, of several capacities; destroy twice; nothing is left behind."""
    it, problems = own_layer(world), []
    inputs = it.some(300 - world.rank)
    expected = it.run(inputs)
    it.make_buffer(4096).destroy()  # whatever is allocated once and kept
    before = _free_bytes()
    for capacity in (300, 512, 4096, 301, 512):
        buffer = it.make_buffer(capacity)
        if not equal_bits(it.run(inputs, buffer=buffer), expected):
            problems.append(f"capacity {capacity}: other bits")
        buffer.destroy()
        buffer.destroy()
        try:
            it.call(10, buffer=buffer)
            problems.append("a call on a destroyed buffer was not refused")
        except mm.MegaMoeError:
            pass
        del buffer
    lost = before - _free_bytes()
    if lost > 64 << 20:
        problems.append(f"{lost} bytes of device memory are lost")
    with it.make_buffer(128):
        pass
    return "; ".join(problems)


def check_dropped(world: World) -> str:
    """A buffer that is dropped without destroy() warns, and others go on working."""
    it, problems = own_layer(world), []
    buffer = it.make_buffer(128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del buffer
        gc.collect()
    if not any(issubclass(w.category, ResourceWarning) and "destroy()" in str(w.message) for w in caught):
        problems.append(f"no ResourceWarning: {[str(w.message) for w in caught]}")
    buffer = it.make_buffer(128)
    buffer.destroy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del buffer
        gc.collect()
    if any("SymmBuffer" in str(w.message) for w in caught):
        problems.append("a destroyed buffer warned")
    inputs = it.some(100)
    problems.append(it.judge(inputs, it.run(inputs)))
    return "; ".join(problem for problem in problems if problem)


def check_stats(world: World) -> str:
    """Counters of the local experts add up over calls, variants and ranks; calls without them count nothing."""
    it = own_layer(world)
    stats, wanted = it.new_stats(), torch.zeros(it.shape.experts // world.ranks, dtype=torch.int64)
    problems = []
    for number in range(12):
        tokens = (200, 1, 0, 512)[(number + world.rank) % 4]
        inputs = it.some(
            tokens, number, route=("topk", "hot", "lognormal")[number % 3], masked_ratio=0.2 * (number % 2)
        )
        counted = number % 4 != 3
        it.run(inputs, variant=variant_of(MODES[number % len(MODES)], world.rank), stats=stats if counted else None)
        wanted += it.counts(inputs) * counted
        if not torch.equal(stats.cpu().to(torch.int64), wanted):
            problems.append(f"after call {number}: {stats.tolist()}, must be {wanted.tolist()}")
    return "; ".join(problems[:2])


def check_side_streams(world: World) -> str:
    """Calls that wander over streams are ordered by the buffer; ranks use different ones."""
    it, problems = own_layer(world), []
    inputs = it.some(120 + world.rank)
    expected = it.run(inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    outputs = [it.poisoned(120 + world.rank) for _ in range(24)]
    torch.cuda.synchronize()
    for number, y in enumerate(outputs):
        with torch.cuda.stream(streams[(number * (1 + world.rank % 2)) % 3]):
            it.call(120 + world.rank, y=y)
    it.buffer.check()
    problems += [f"call {i}: other bits" for i, y in enumerate(outputs) if not equal_bits(y, expected)]
    return "; ".join(problems[:3])


CHECKS: dict[str, Callable[[World], str]] = {
    "stats add up": check_stats,
    **{f"stalls, {mode}": partial(check_stalls, mode) for mode in MODES},
    "side streams": check_side_streams,
    "graphs of two sizes": check_graphs,
    "replays on some ranks": check_graph_on_some,
    "replays in a row": check_replays_in_a_row,
    "capture without preparation": check_capture_unprepared,
    "two buffers": check_two_buffers,
    "ring pools": check_ring,
    "destroy and recreate": check_recreate,
    "dropped": check_dropped,
    "soak": check_soak,
}
