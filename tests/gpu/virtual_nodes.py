"""Two nodes of several virtual ranks on one GPU: all as in `tests/gpu/virtual.py`, and rails between the threads.

A rail copies from tensor to tensor, since all of them are on this GPU; everything else is the product. Run as a
program, as there:

    python -m tests.gpu.virtual_nodes RANKS_PER_NODE [NAME ...]      prints a line of JSON for each check
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights, make_inputs, make_weights
from megamoe_jit._check.verify import judge
from megamoe_jit._check.verify_ranks import share_of
from megamoe_jit._jit.runtime import warmup
from megamoe_jit._layer.stream_order import StreamOrder
from megamoe_jit._nodes.along_rails import ExactExchange, GatherExchange
from megamoe_jit._nodes.choice import Choices, Rule
from megamoe_jit._spec import FP8, MXFP4, KernelSpec, MoEShape, Variant
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit.heuristics.select import all_variants
from megamoe_jit.reference import moe_reference
from tests.gpu.virtual import FREE_SMS, Group, Meeting, gather, in_threads, leave, say, stand_in
from tests.multi.worker import CLAMP, equal_bits

NODES = 2
HIDDEN, INTERMEDIATE, TOPK = 512, 512, 4
CAPACITY = 192
WAYS = (("gather", "bf16", 1), ("exact", "bf16", 1), ("gather", "bf16", 3), ("exact", "bf16", 3))
ROUTES = ("topk", "hot", "powerlaw:1.2")


class Rail:
    """A rail between threads; everybody's stream is waited for before others read what it wrote."""

    timeout_s = 60.0

    def __init__(self, meeting: Meeting, node: int) -> None:
        self.meeting, self.nodes, self.node = meeting, meeting.ranks, node

    def _meet(self, value: Any) -> list[Any]:
        torch.cuda.current_stream().synchronize()
        return gather(Group(self.meeting, self.node), value)

    def _leave(self) -> None:
        torch.cuda.current_stream().synchronize()
        gather(Group(self.meeting, self.node), None)

    def gather(self, outputs, inputs) -> None:
        for theirs, node in zip(self._meet(list(inputs)), range(self.nodes), strict=True):
            for output, given in zip(outputs, theirs, strict=True):
                rows = given.shape[0]
                output[node * rows : (node + 1) * rows].view(torch.uint8).copy_(given.view(torch.uint8))
        self._leave()

    def swap(self, output, given, arriving=None, leaving=None) -> None:
        leaving = list(leaving) if leaving is not None else [given.shape[0] // self.nodes] * self.nodes
        begin = 0
        for parts in self._meet(given.split(leaving)):
            rows = parts[self.node].shape[0]
            output[begin : begin + rows].copy_(parts[self.node])
            begin += rows
        assert begin == output.shape[0]
        self._leave()

    def counts(self, mine):
        everyone = self._meet(mine.tolist())
        return lambda: everyone

    def error(self, device) -> None:
        return None

    def abort(self, device) -> None:
        pass


class VirtualNodeRank:
    """A thread's place: its node's group, its rail, its weights."""

    def __init__(self, rank: int, ranks_per_node: int, meetings: dict[Any, Meeting], weights: Weights, shape: MoEShape):
        self.rank, self.shape, self.weights = rank, shape, weights
        self.node, local = divmod(rank, ranks_per_node)
        self.ranks_per_node, world = ranks_per_node, NODES * ranks_per_node
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.everyone = Group(meetings["all"], rank)
        node_group = Group(meetings["node", self.node], local) if ranks_per_node > 1 else None
        self.rail = Rail(meetings["rail", local], self.node)
        self.topology = SimpleNamespace(
            group=self.everyone, node_group=node_group, nodes=NODES, node=self.node, ranks_per_node=ranks_per_node,
            local_rank=local, world_size=world, rank=rank, place_of=str,
            roll_call=SimpleNamespace(calls=0, missing=dict, give_notice=lambda: None),
        )  # fmt: skip
        pairs = [tuple(t.clone() for t in share_of(p, shape, rank, world)) for p in (weights.l1, weights.l2)]
        self.l1, self.l2 = mm.transform_weights_for_mega_moe_sm90(*pairs)
        self.sms = (torch.cuda.get_device_properties(0).multi_processor_count - FREE_SMS) // world

    def buffer(self, exchange: str, partial: str, chunks: int, weight_format: str = "fp8") -> mm.MultiNodeBuffer:
        """A buffer whose launches leave room for those of the other threads."""
        its = [it for it in (GatherExchange(self.rail), ExactExchange(self.rail)) if it.name == exchange]
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[partial]
        choices = Choices(its, self.rail, Rule(self.shape, NODES, self.ranks_per_node, exchange, dtype.itemsize))
        made = mm.MultiNodeBuffer(
            self.topology, self.shape, CAPACITY, self.device, choices, partial=dtype, chunks=chunks
        )
        for experts in made._all_experts():  # all ranks are on one GPU here, and must not come one after the other
            experts.buffer.order = StreamOrder(self.device, shared=False)
            experts.buffer.lock = experts.buffer.order.lock
            launch = experts.compute
            experts.compute = functools.partial(self._together, launch)
        made.prepare(weight_format=weight_format)
        return made

    def _together(self, launch: Callable[..., None], *arguments: Any) -> None:
        """No thread waits for its stream before the launches of its node are in theirs."""
        group = self.topology.node_group
        gather(group, None)
        launch(*arguments)
        gather(group, None)

    def inputs(self, tokens: int, route: str, seed: int) -> Inputs:
        case = Scenario(f"nodes.{route}.{tokens}", self.shape, tokens, CAPACITY, route=route)
        return make_inputs(case, self.device, 64 * seed + self.rank, self.weights)

    def run(self, buffer: mm.MultiNodeBuffer, inputs: Inputs, padded: int | None = None) -> torch.Tensor:
        buffer.x.view(torch.uint8).fill_(0x7F)
        buffer.x_sf.fill_(float("nan"))
        buffer.topk_idx.zero_()
        buffer.topk_weights.fill_(float("nan"))
        inputs.stage(buffer)
        y = torch.full((inputs.x_q.shape[0], HIDDEN), float("nan"), dtype=torch.bfloat16, device=self.device)
        mm.fp8_mega_moe_multinode(y, self.l1, self.l2, buffer, padded, CLAMP, num_sms=self.sms)
        torch.cuda.current_stream().synchronize()
        return y

    def expected(self, inputs: Inputs) -> torch.Tensor:
        routed = inputs.x_q, inputs.x_sf, inputs.topk_idx, inputs.topk_weights
        return moe_reference(*routed, inputs.l1, inputs.l2, activation_clamp=CLAMP)


def tokens_of(rank: int, number: int) -> int:
    return (0, 1, 33, 131, CAPACITY)[(rank + number) % 5]


def check_every_way_has_the_same_bits(it: VirtualNodeRank) -> str:
    """Against the reference, and one way against the other: gather, exact, in chunks, again."""
    problems, first = [], {}
    for exchange, partial, chunks in (*WAYS, WAYS[0]):
        buffer = it.buffer(exchange, partial, chunks)
        for number, route in enumerate(ROUTES):
            inputs = it.inputs(tokens_of(it.rank, number), route, number)
            y, name = it.run(buffer, inputs), f"{exchange} {chunks} {route}"
            if route not in first:
                first[route] = y
                verdict = judge(y, it.expected(inputs))
                problems += [] if verdict.passed else [f"{name}: {verdict.reason}"]
            elif not equal_bits(y, first[route]):
                problems.append(f"{name}: other bits")
        buffer.destroy()
    return "; ".join(problems)


def check_float32(it: VirtualNodeRank) -> str:
    """Partials in float32: the sum of what nodes give is rounded once."""
    buffer, inputs = it.buffer("gather", "fp32", 1), it.inputs(131, "topk", 7)
    y = it.run(buffer, inputs)
    verdict = judge(y, it.expected(inputs))
    other = it.buffer("exact", "fp32", 3)
    same = equal_bits(it.run(other, inputs), y)
    for made in (buffer, other):
        made.destroy()
    return ("" if verdict.passed else verdict.reason) + ("" if same else "exact in chunks: other bits")


def check_masked(it: VirtualNodeRank) -> str:
    """A rank whose slots are all masked, one that has duplicates, and fewer rows than there is room for."""
    inputs = it.inputs(40, "topk", 9)
    ids = torch.full_like(inputs.topk_idx, -1) if it.rank % 2 else inputs.topk_idx[:, :1].expand(-1, TOPK).contiguous()
    inputs = replace(inputs, topk_idx=ids)
    buffer = it.buffer("gather", "bf16", 1)
    y = it.run(buffer, inputs, 41)
    buffer.destroy()
    verdict = judge(y, it.expected(inputs))
    return "" if verdict.passed else verdict.reason


def check_packed(it: VirtualNodeRank) -> str:
    """MXFP4, in either form: the kernel of a node has them as it has them without nodes."""
    world, drawn = NODES * it.ranks_per_node, make_weights(it.shape, it.device, weights=MXFP4)
    pairs = [tuple(t.clone() for t in share_of(p, it.shape, it.rank, world)) for p in (drawn.l1, drawn.l2)]
    plain, it.l1, it.l2 = (it.l1, it.l2), *mm.transform_weights_for_mega_moe_sm90(*pairs)
    inputs, outputs = replace(it.inputs(131, "topk", 3), l1=drawn.l1, l2=drawn.l2), []
    for exchange, chunks in (("gather", 1), ("exact", 3)):
        buffer = it.buffer(exchange, "bf16", chunks, MXFP4.name)
        outputs.append(it.run(buffer, inputs))
        buffer.destroy()
    it.l1, it.l2 = plain
    verdict = judge(outputs[0], it.expected(inputs))
    return ("" if verdict.passed else verdict.reason) + ("" if equal_bits(*outputs) else "exact in chunks: other bits")


CHECKS: dict[str, Callable[[VirtualNodeRank], str]] = {
    "every way": check_every_way_has_the_same_bits,
    "float32": check_float32,
    "masked": check_masked,
    "packed": check_packed,
}


def main(ranks_per_node: int, checks: list[str]) -> int:
    """Run the checks; 0 if all threads came to their ends."""
    stand_in()
    world = NODES * ranks_per_node
    shape = MoEShape(HIDDEN, INTERMEDIATE, 3 * world, TOPK)
    node = MoEShape(HIDDEN, INTERMEDIATE, 3 * ranks_per_node, TOPK)
    specs = [
        KernelSpec(node, v, ranks_per_node, numerics=Numerics(float32_out=wide))
        for v in Variant.reading(FP8)
        for wide in (False, True)
    ]
    packed = all_variants(node, MXFP4, ranks=ranks_per_node, most=NODES * CAPACITY)
    specs += [KernelSpec(node, v, ranks_per_node, weights=MXFP4) for v in packed]
    for result in warmup(specs):
        if result.error is not None:
            raise result.error
    weights = make_weights(shape, torch.device("cuda"))
    meetings: dict[Any, Meeting] = {"all": Meeting(world)}
    meetings |= {("node", number): Meeting(ranks_per_node) for number in range(NODES)}
    meetings |= {("rail", number): Meeting(NODES) for number in range(ranks_per_node)}

    def rank_of_a_node(rank: int) -> None:
        it = VirtualNodeRank(rank, ranks_per_node, meetings, weights, shape)
        for name in checks:
            problems = gather(it.everyone, CHECKS[name](it))
            if rank == 0:
                say(name, problems)

    return in_threads(rank_of_a_node, list(meetings.values()))


if __name__ == "__main__":
    leave(main(int(sys.argv[1]), sys.argv[2:] or list(CHECKS)))
