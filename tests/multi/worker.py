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
from megamoe_jit._scenarios import Scenario, make_inputs, make_weights
from megamoe_jit._spec import MoEShape
from megamoe_jit._verify import judge
from megamoe_jit.reference import expert_counts, moe_reference


@dataclass
class Rank:
    """This process's place, and one layer on it."""

    rank: int
    ranks: int
    device: torch.device
    shape: MoEShape
    capacity: int

    def __post_init__(self) -> None:
        self.weights = make_weights(self.shape, self.device)
        local = self.shape.experts // self.ranks
        mine = slice(self.rank * local, (self.rank + 1) * local)
        pairs = [tuple(t[mine].contiguous() for t in pair) for pair in (self.weights.l1, self.weights.l2)]
        self.l1, self.l2 = mm.transform_weights_for_mega_moe_sm90(*pairs)
        self.buffer = self.make_buffer()

    def make_buffer(self) -> mm.SymmBuffer:
        """A buffer of this layer; collective."""
        s = self.shape
        return mm.get_symm_buffer_for_mega_moe(
            dist.group.WORLD if self.ranks > 1 else None,
            s.experts,
            self.capacity,
            s.topk,
            s.hidden,
            s.intermediate,
            device=self.device,
        )

    def inputs(self, scenario: Scenario, seed: int = 0):
        """This rank's inputs; they differ from rank to rank."""
        return make_inputs(scenario, self.device, seed * 64 + self.rank, self.weights)

    def stage(self, inputs, buffer: mm.SymmBuffer | None = None) -> None:
        """Copy inputs into the buffer, and NaN that names live experts behind them."""
        buffer = self.buffer if buffer is None else buffer
        t = inputs.x_q.shape[0]
        buffer.x.view(torch.uint8).fill_(0x7F)
        buffer.x_sf.fill_(math.nan)
        buffer.topk_idx.zero_()
        buffer.topk_weights.fill_(math.nan)
        buffer.x[:t].copy_(inputs.x_q)
        buffer.x_sf[:t].copy_(inputs.x_sf)
        buffer.topk_idx[:t].copy_(inputs.topk_idx)
        buffer.topk_weights[:t].copy_(inputs.topk_weights)

    def call(self, tokens: int, *, clamp=10.0, variant=None, buffer=None, stats=None, y=None, num_sms=None):
        """One launch; poisoned output."""
        if y is None:
            y = torch.full((tokens, self.shape.hidden), math.nan, dtype=torch.bfloat16, device=self.device)
        mm.fp8_mega_moe(
            y,
            self.l1,
            self.l2,
            self.buffer if buffer is None else buffer,
            stats,
            activation_clamp=clamp,
            variant=variant,
            num_sms=num_sms,
        )
        return y

    def expected(self, inputs, clamp=10.0) -> torch.Tensor:
        """The reference of this rank's tokens."""
        return moe_reference(
            inputs.x_q,
            inputs.x_sf,
            inputs.topk_idx,
            inputs.topk_weights,
            self.weights.l1,
            self.weights.l2,
            activation_clamp=clamp,
        )

    def check(self, scenario: Scenario, variant: str | None = None, seed: int = 0) -> str:
        """Run one scenario on all ranks; what is wrong on this one, or nothing."""
        inputs = self.inputs(scenario, seed)
        tokens = inputs.x_q.shape[0]
        local = self.shape.experts // self.ranks
        stats = torch.full((local,), 3, dtype=torch.int32, device=self.device)
        self.stage(inputs)
        y = self.call(tokens, clamp=scenario.clamp, variant=variant, stats=stats)
        self.buffer.check()
        verdict = judge(y, self.expected(inputs, scenario.clamp))
        counts = expert_counts(inputs.topk_idx, self.shape.experts).to(torch.int64)
        dist.all_reduce(counts)
        mine = counts[self.rank * local : (self.rank + 1) * local] + 3
        problems = [verdict.reason] if verdict.reason else []
        if not torch.equal(stats.to(torch.int64), mine):
            problems.append("expert counters are wrong")
        return "; ".join(problems)


def scenario_for(shape: MoEShape, tokens: int, capacity: int, **more) -> Scenario:
    """A scenario of this module's own."""
    return replace(Scenario(f"ranks.t{tokens}", shape, tokens, capacity), **more)
