"""Several ranks of the protocol on one GPU: a thread, a stream and a share of the SMs for each.

Collectives meet at a barrier of the threads, and "symmetric" memory is ordinary memory of the same GPU, so a peer's
address is as good as one's own.  The kernels are those of several ranks, unchanged; only the NVLink between them is
missing.  Run as a program, in a process of its own: a fault breaks the CUDA context, and the streams need hardware
queues of their own.

    python -m tests.gpu.virtual RANKS [NAME ...]      prints a line of JSON for each check
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

from megamoe_jit._check.scenarios import SCENARIOS, Inputs, Scenario, Weights, make_weights
from megamoe_jit._compile import render as _render
from megamoe_jit._layer import buffer as _buffer
from megamoe_jit._layer import group as _ranks
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._layer.stream_order import StreamOrder
from megamoe_jit._spec import FP8, MoEShape, Variant
from megamoe_jit.reference import expert_counts, moe_reference
from tests.multi.harness import warm
from tests.multi.worker import CLAMP, MIXED, MODES, Rank, equal_bits, shape_for

SIZES = (512, 512, 24, 4)
CAPACITY = 512
FREE_SMS = 4  #: for the streams' other work
SOAK_ROUNDS = 60
LARGEST = 64 << 20  #: bytes of one rank's combine slots that a scenario may need here


class Meeting:
    """Where the threads meet."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.values: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=120)


class Group:
    """One thread's view of the process group."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self._rank = meeting, rank

    def size(self) -> int:
        return self.meeting.ranks

    def rank(self) -> int:
        return self._rank


def gather(group: Group | None, value: Any) -> list[Any]:
    """Stands in for `_ranks.gather`."""
    if group is None:
        return [value]
    meeting = group.meeting
    meeting.values[group.rank()] = value
    meeting.barrier.wait()
    everyone = list(meeting.values)
    meeting.barrier.wait()
    return everyone


def allocate(group: Group, size: int, device: torch.device, _: object) -> tuple[torch.Tensor, Any]:
    """Stands in for `_symmetric.allocate_symmetric`."""
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    return memory, SimpleNamespace(buffer_ptrs=gather(group, memory.data_ptr()))


class VirtualRank(Rank):
    """A rank whose peers are threads of this process."""

    def __init__(self, group: Group, shape: MoEShape, capacity: int, fast_math: bool, weights: Weights) -> None:
        self._group = group
        device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(group.rank(), group.size(), device, shape, capacity, weights)
        # all ranks are on one GPU here, and must not come one after the other
        self.buffer.order = StreamOrder(device, shared=False)
        self.buffer.lock = self.buffer.order.lock
        self.buffer.prepare("pingpong", fast_math)

    @property
    def group(self) -> Group:
        return self._group

    def expected_beside_others(self, inputs: Inputs, clamp: float | None) -> torch.Tensor:
        """The reference of this rank's tokens.  One thread works it out for all: here the host's time counts."""
        torch.cuda.current_stream().synchronize()
        everyone, parts = gather(self._group, inputs), None
        if self.rank == 0:
            given = ((each.x_q.view(torch.uint8), each.x_sf, *each.slots) for each in everyone)
            codes, *others = (torch.cat(tensors) for tensors in zip(*given, strict=True))
            weights = self.weights.l1, self.weights.l2
            y = moe_reference(codes.view(torch.float8_e4m3fn), *others, *weights, activation_clamp=clamp)
            torch.cuda.current_stream().synchronize()
            parts = y.split([len(each.x_q) for each in everyone])
        return gather(self._group, parts)[0][self.rank]

    def counts(self, inputs) -> torch.Tensor:
        mine = expert_counts(inputs.topk_idx, self.shape.experts).to("cpu", torch.int64)
        local = self.shape.experts // self.ranks
        return sum(gather(self._group, mine))[self.rank * local : (self.rank + 1) * local]

    def launched(self, tokens: int, launch: Callable[[torch.Tensor, int], Any], y: torch.Tensor | None = None):
        """The output of a launch; those of all ranks are in their streams before anybody does anything else."""
        sms = (torch.cuda.get_device_properties(0).multi_processor_count - FREE_SMS) // self.ranks
        y = self.poisoned(tokens) if y is None else y
        torch.cuda.current_stream().synchronize()
        gather(self._group, None)
        launch(y, sms)
        gather(self._group, None)
        return y

    def call(self, tokens, **more):
        y, sms = more.pop("y", None), more.pop("num_sms", None)
        run = super().call
        return self.launched(tokens, lambda y, share: run(tokens, y=y, num_sms=sms or share, **more), y)


def check_scenario(scenario: Scenario, it: VirtualRank) -> str:
    """A scenario of the table on every rank, each with inputs of its own."""
    inputs = it.inputs(scenario)
    expected = it.expected_beside_others(inputs, scenario.clamp)
    modes = MODES if it.ranks == 2 else ("mixed",)
    problems = [
        it.check(inputs, m, expected=expected, clamp=scenario.clamp, fast_math=scenario.fast_math) for m in modes
    ]
    return "; ".join(p for p in problems if p)


def check_ragged(it: VirtualRank) -> str:
    """Other token counts on every rank, 0 and the capacity among them."""
    problems = []
    for counts in ((0, CAPACITY), (CAPACITY, 1), (7, 131, 257), (0, 0, 0, 1)):
        inputs = it.some(counts[it.rank % len(counts)], route="powerlaw:1.2")
        problems += [it.check(inputs, mode) for mode in MODES]
    return "; ".join(p for p in problems if p)


def check_soak(it: VirtualRank) -> str:
    """Rounds of random sizes, routes, variants and delays; the same inputs always give the same bits."""
    pool = {
        (t, seed): it.some(t, seed, route=("topk", "hot")[seed]) for t in (0, 1, 33, 257, CAPACITY) for seed in (0, 1)
    }
    mine, first, problems = random.Random(it.rank), {}, []
    for number in range(SOAK_ROUNDS):
        key, variant = mine.choice(list(pool)), mine.choice(MODES[:2])
        it.stage(pool[key])
        if mine.random() < 0.5:
            torch.cuda._sleep(mine.randint(1, 4_000_000))
        y = it.call(key[0], variant=variant)
        it.buffer.check()
        if key not in first:
            first[key] = y
            problems.append(it.judge(pool[key], y))
        elif not equal_bits(y, first[key]):
            problems.append(f"round {number}: other bits")
    return "; ".join(p for p in problems if p)


def check_from_bf16(it: VirtualRank) -> str:
    """Staged in the launch by all ranks, by some, by none; the same bits as where the caller stages."""
    it.buffer.prepare_all()  # nothing is loaded while a kernel waits for its peers
    problems = []
    for tokens in (CAPACITY - it.rank, 33 + it.rank, 0):
        inputs = it.some(tokens)
        wanted = it.run(inputs)
        it.buffer.check()
        for name, raw in (("all", True), ("some", it.rank % 2 == 0), ("none", False)):
            batch = (inputs.x if raw else inputs.x.float(), inputs.topk_idx, inputs.topk_weights)
            y = it.launched(
                tokens,
                lambda y, sms, given=batch: mega_moe_from_bf16(
                    *given, it.l1, it.l2, it.buffer, y=y, activation_clamp=CLAMP, num_sms=sms
                ),
            )
            it.buffer.check()
            if not equal_bits(y, wanted):
                problems.append(f"{tokens} tokens, staged in the launch by {name}: other bits")
    return "; ".join(problems)


OWN: dict[str, Callable[[VirtualRank], str]] = {
    "ragged": check_ragged,
    "soak": check_soak,
    "from bf16": check_from_bf16,
}


def names(ranks: int) -> list[str]:
    """The checks there are for so many ranks."""
    table = [
        s.name
        for s in SCENARIOS
        if s.shape.experts % ranks == 0 and not s.slow and s.capacity * s.shape.topk * s.shape.hidden * 2 <= LARGEST
    ]
    return table + list(OWN)


def layer_of(name: str, ranks: int) -> tuple[MoEShape, int, bool]:
    """Shape, capacity and `fast_math` of a check's layer."""
    table = {s.name: s for s in SCENARIOS}
    if name not in table:
        return shape_for(ranks, *SIZES), CAPACITY, True
    scenario = table[name]
    return scenario.shape, scenario.capacity, scenario.fast_math


def _rank(group: Group, checks: list[str], weights: dict[MoEShape, Weights]) -> None:
    """Checks of one layer, one after the other, have the same ranks, as in `tests/multi`."""
    table = {s.name: s for s in SCENARIOS}
    for (shape, *others), names in itertools.groupby(checks, lambda name: layer_of(name, group.size())):
        it = VirtualRank(group, shape, *others, weights[shape])
        for name in names:
            problems = gather(group, check_scenario(table[name], it) if name in table else OWN[name](it))
            if group.rank() == 0:
                say(name, problems)
        it.buffer.destroy()


def once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same for several threads, which have one interpreter: no argument is worked on twice."""
    lock, known = threading.Lock(), {}

    def found(argument: Any) -> Any:
        with lock:
            if argument not in known:
                known[argument] = function(argument)
            return known[argument]

    return found


def stand_in() -> None:
    """Put the threads' collectives and memory in the places of torch's, and render each source once for all of them."""
    for module, name, ours in (
        (_render, "render", once(_render.render)),
        (_ranks, "gather", gather),
        (_buffer, "gather", gather),
        (_memory, "allocate_symmetric", allocate),
    ):
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, ours)


def say(name: str, problems: Sequence[str]) -> None:
    """A line of the program's output: a check, and what is wrong on which rank."""
    problem = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(problems) if each)
    sys.stdout.write(json.dumps([name, problem]) + "\n")
    sys.stdout.flush()


def in_threads(body: Callable[[int], None], meetings: Sequence[Meeting]) -> int:
    """Run a thread with a stream of its own for each rank of the first meeting; 0 if all came to their ends."""
    torch.cuda.synchronize()
    failures: list[str] = []

    def run(rank: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                body(rank)
        except BaseException:
            failures.append(f"rank {rank}: {traceback.format_exc()}")
            for meeting in meetings:
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(meetings[0].ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stderr.write("\n".join(failures))
    return 1 if failures else 0


def leave(code: int) -> NoReturn:
    """End the program; a broken context must not hide what it said behind an abort."""
    sys.stderr.flush()
    os._exit(code)


def main(ranks: int, checks: list[str]) -> int:
    """Run the checks; 0 if all threads came to their ends."""
    stand_in()
    layers = {name: layer_of(name, ranks) for name in checks}
    first = {layer: number for number, layer in reversed(list(enumerate(layers.values())))}
    checks = sorted(checks, key=lambda name: first[layers[name]])  # those of one layer side by side
    table = {s.name: s for s in SCENARIOS}
    made = {shape: make_weights(shape, torch.device("cuda")) for shape in dict.fromkeys(shape for shape, *_ in first)}
    variants = Variant.reading(FP8) if ranks == 2 else [Variant.parse(name) for name in MIXED]
    warm(list(made), ranks, variants=variants)
    warm([table[n].shape for n in checks if n in table and not table[n].fast_math], ranks, (False,), variants=variants)
    warm([shape_for(ranks, *SIZES)], ranks)
    meeting = Meeting(ranks)
    return in_threads(lambda rank: _rank(Group(meeting, rank), checks, made), [meeting])


if __name__ == "__main__":
    chosen = int(sys.argv[1])
    leave(main(chosen, sys.argv[2:] or names(chosen)))
