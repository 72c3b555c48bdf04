"""One rank of a multi-GPU test: inputs, the call, and the judgement against an oracle over all ranks' weights.

Every rank draws all experts' weights from one seed, so each can compute its own tokens' reference alone; nothing of the
oracle goes through the code under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights, make_inputs, make_weights
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import judge
from megamoe_jit._check.verify_ranks import share_of
from megamoe_jit._spec import FP8, MoEShape, Variant
from megamoe_jit.reference import expert_counts, moe_reference

CLAMP = 10.0
STATS_BEFORE = 3  #: what the counters hold before a call, because they accumulate
MIXED = ("pingpong", "cooperative")  #: that `auto` takes, so that they are prepared together
MODES = (*(variant.value for variant in Variant.reading(FP8)), "mixed")


def variant_of(mode: str, rank: int) -> str:
    """The variant that a rank runs in a mode; `mixed` has several at once."""
    return MIXED[rank % len(MIXED)] if mode == "mixed" else mode


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same bytes: NaN equals NaN, and zeros keep their sign."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def shape_for(ranks: int, hidden: int, intermediate: int, experts: int, topk: int) -> MoEShape:
    """A shape with as many experts, or a few more so that the ranks share them evenly."""
    return MoEShape(hidden, intermediate, -(-experts // ranks) * ranks, topk)


@dataclass
class Rank:
    """This process's place, and one layer on it."""

    rank: int
    ranks: int
    device: torch.device
    shape: MoEShape
    capacity: int
    weights: Weights | None = None  #: of the shape, if they are there already

    def __post_init__(self) -> None:
        if self.weights is None:
            self.weights = make_weights(self.shape, self.device)
        drawn = (self.weights.l1, self.weights.l2)
        pairs = [tuple(t.clone() for t in share_of(pair, self.shape, self.rank, self.ranks)) for pair in drawn]
        self.l1, self.l2 = mm.transform_weights_for_mega_moe_sm90(*pairs)
        self.buffer = self.make_buffer()

    @property
    def group(self):
        """The process group, as callers pass it."""
        return dist.group.WORLD if self.ranks > 1 else None

    def make_buffer(self, capacity: int | None = None, **more) -> mm.SymmBuffer:
        """A buffer of this layer; collective."""
        s, capacity = self.shape, self.capacity if capacity is None else capacity
        return mm.get_symm_buffer_for_mega_moe(
            self.group, s.experts, capacity, s.topk, s.hidden, s.intermediate, s.shared, device=self.device, **more
        )

    def inputs(self, scenario: Scenario, seed: int = 0) -> Inputs:
        """This rank's inputs; they differ from rank to rank."""
        return make_inputs(scenario, self.device, seed * 64 + self.rank, self.weights)

    def some(self, tokens: int, seed: int = 0, **more) -> Inputs:
        """Inputs of a scenario of this module's own."""
        return self.inputs(scenario_for(self.shape, tokens, self.capacity, **more), seed)

    def stage(self, inputs: Inputs, buffer: mm.SymmBuffer | None = None) -> None:
        """Copy inputs into the buffer, and NaN that names live experts behind them."""
        buffer = self.buffer if buffer is None else buffer
        self.poison(buffer)
        inputs.stage(buffer)

    def poison(self, buffer: mm.SymmBuffer | None = None) -> None:
        """Have the buffer hold what no call must read: NaN that names live experts."""
        buffer = self.buffer if buffer is None else buffer
        buffer.x.view(torch.uint8).fill_(0x7F)
        buffer.x_sf.fill_(math.nan)
        buffer.topk_idx.zero_()
        buffer.topk_weights.fill_(math.nan)

    def poisoned(self, tokens: int) -> torch.Tensor:
        """Output full of NaN."""
        return torch.full((tokens, self.shape.hidden), math.nan, dtype=torch.bfloat16, device=self.device)

    def call(self, tokens, *, clamp=CLAMP, variant=None, buffer=None, stats=None, y=None, fast_math=True, num_sms=None):
        """One launch; poisoned output."""
        y = self.poisoned(tokens) if y is None else y
        buffer = self.buffer if buffer is None else buffer
        mm.fp8_mega_moe(
            y,
            self.l1,
            self.l2,
            buffer,
            stats,
            activation_clamp=clamp,
            variant=variant,
            fast_math=fast_math,
            num_sms=num_sms,
        )
        return y

    def run(self, inputs: Inputs, **more) -> torch.Tensor:
        """Stage and call."""
        self.stage(inputs, more.get("buffer"))
        return self.call(inputs.x_q.shape[0], **more)

    def expected(self, inputs: Inputs, clamp=CLAMP) -> torch.Tensor:
        """The reference of this rank's tokens."""
        return moe_reference(
            inputs.x_q,
            inputs.x_sf,
            *inputs.slots,
            self.weights.l1,
            self.weights.l2,
            activation_clamp=clamp,
        )

    def counts(self, inputs: Inputs) -> torch.Tensor:
        """Rows that all ranks send to each of this rank's experts; int64 on the CPU.  Collective."""
        counts = expert_counts(inputs.topk_idx, self.shape.experts).to("cpu", torch.int64)
        dist.all_reduce(counts)
        local = self.shape.experts // self.ranks
        return counts[self.rank * local : (self.rank + 1) * local]

    def new_stats(self, value: int = 0) -> torch.Tensor:
        """Counters of the local experts."""
        return torch.full((self.shape.experts // self.ranks,), value, dtype=torch.int32, device=self.device)

    def judge(self, inputs: Inputs, y: torch.Tensor, expected: torch.Tensor | None = None, clamp=CLAMP) -> str:
        """What is wrong with an output, or nothing."""
        return judge(y, self.expected(inputs, clamp) if expected is None else expected).reason

    def check(self, inputs: Inputs, mode: str = "pingpong", *, expected=None, clamp=CLAMP, fast_math=True) -> str:
        """Run these inputs on all ranks; what is wrong on this one, or nothing.  Collective."""
        stats = self.new_stats(STATS_BEFORE)
        variant = variant_of(mode, self.rank)
        y = self.run(inputs, clamp=clamp, variant=variant, stats=stats, fast_math=fast_math)
        self.buffer.check()
        problems = [self.judge(inputs, y, expected, clamp)]
        wanted = self.counts(inputs) + STATS_BEFORE
        if not torch.equal(stats.cpu().to(torch.int64), wanted):
            problems.append(f"expert counters are {stats.tolist()}, must be {wanted.tolist()}")
        return "; ".join(f"{mode}: {problem}" for problem in problems if problem)


def scenario_for(shape: MoEShape, tokens: int, capacity: int, **more) -> Scenario:
    """A scenario of this module's own."""
    return replace(Scenario(f"ranks.t{tokens}", shape, tokens, capacity), **more)


_last: Rank | None = None


def layer(world: World, shape: MoEShape, capacity: int) -> Rank:
    """A layer on this rank; the last one again if it fits.  Collective."""
    global _last
    if _last is not None and (_last.shape, _last.capacity) == (shape, capacity):
        return _last
    weights = None
    if _last is not None:
        _last.buffer.destroy()
        before, wanted = (MoEShape(s.hidden, s.intermediate, s.experts, 1) for s in (_last.shape, shape))
        weights = _last.weights if before == wanted else None
        _last = None
        torch.cuda.empty_cache()
    _last = Rank(world.rank, world.ranks, world.device, shape, capacity, weights)
    return _last


def forget() -> None:
    """Destroy the layer that `layer` keeps.  Collective."""
    global _last
    if _last is not None:
        _last.buffer.destroy()
        _last = None
