"""The layer over nodes of one GPU each, NCCL between them: checks of `tests/multi/harness.py`."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Inputs, Scenario, make_inputs, make_weights
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import judge
from megamoe_jit._check.verify_ranks import share_of
from megamoe_jit.reference import moe_reference
from tests.multi.worker import CLAMP, equal_bits, shape_for

SIZES = (2048, 1024, 32, 4)
CAPACITY = 512
WAYS = (("gather", "bf16", 1), ("exact", "bf16", 1), ("gather", "bf16", 3), ("exact", "bf16", 2), ("auto", "bf16", 4))
ROUNDS = 40


class NodeRank:
    """This process as a node of its own."""

    def __init__(self, world: World, ranks_per_node: int = 1) -> None:
        self.rank, self.device = world.rank, world.device
        self.shape = shape_for(world.ranks, *SIZES)
        self.topology = mm.NodeTopology(dist.group.WORLD, ranks_per_node=ranks_per_node)
        self.weights = make_weights(self.shape, world.device)
        drawn = self.weights.l1, self.weights.l2
        self.pairs = [tuple(t.clone() for t in share_of(p, self.shape, world.rank, world.ranks)) for p in drawn]
        own = [tuple(t.clone() for t in pair) for pair in self.pairs]
        self.l1, self.l2 = mm.transform_weights_for_mega_moe_sm90(*own)

    def buffer(self, exchange: str = "gather", partial: str = "bf16", chunks: int = 1, **more) -> mm.MultiNodeBuffer:
        sizes = self.shape.experts, CAPACITY, self.shape.topk, self.shape.hidden, self.shape.intermediate
        ways = {"exchange": exchange, "partial": partial, "chunks": chunks, **more}
        return mm.get_multinode_buffer_for_mega_moe(self.topology, *sizes, device=self.device, **ways)

    def inputs(self, tokens: int, seed: int = 0, route: str = "topk") -> Inputs:
        case = Scenario(f"nodes.{route}.{tokens}", self.shape, tokens, CAPACITY, route=route)
        return make_inputs(case, self.device, 64 * seed + self.rank, self.weights)

    def run(self, buffer: mm.MultiNodeBuffer, inputs: Inputs, padded: int | None = None) -> torch.Tensor:
        """One call, with garbage past the tokens."""
        tokens = inputs.x_q.shape[0]
        buffer.x[tokens:].view(torch.uint8).fill_(0x7F)
        buffer.topk_idx[tokens:].zero_()
        buffer.topk_weights[tokens:].fill_(float("nan"))
        inputs.stage(buffer)
        y = torch.full((tokens, self.shape.hidden), float("nan"), dtype=torch.bfloat16, device=self.device)
        mm.fp8_mega_moe_multinode(y, self.l1, self.l2, buffer, padded, CLAMP)
        return y

    def wrong(self, inputs: Inputs, y: torch.Tensor) -> str:
        routed = inputs.x_q, inputs.x_sf, inputs.topk_idx, inputs.topk_weights
        verdict = judge(y, moe_reference(*routed, inputs.l1, inputs.l2, activation_clamp=CLAMP))
        return "" if verdict.passed else verdict.reason


_it: list[NodeRank] = []


def here(world: World) -> NodeRank:
    """The same for all checks of a spawn."""
    if not _it:
        _it.append(NodeRank(world))
    return _it[0]


def every_way(world: World) -> str:
    """All forms against the reference, and against each other: ragged, routes, none at all."""
    it, first, problems = here(world), {}, []
    for exchange, partial, chunks in (*WAYS, WAYS[0]):
        with it.buffer(exchange, partial, chunks) as buffer:
            for number, route in enumerate(("topk", "hot", "powerlaw:1.2", "topk")):
                inputs = it.inputs((0, 7, 300, CAPACITY)[(world.rank + number) % 4], number, route)
                y, key, name = it.run(buffer, inputs), (number, route), f"{exchange} {chunks} {route}"
                buffer.check()
                if key not in first:
                    first[key] = y
                    problems += [f"{name}: {said}"] if (said := it.wrong(inputs, y)) else []
                elif not equal_bits(y, first[key]):
                    problems.append(f"{name}: other bits")
    return "; ".join(problems)


def float32(world: World) -> str:
    it, inputs = here(world), here(world).inputs(200)
    outputs = []
    for exchange, chunks in (("gather", 1), ("exact", 3)):
        with it.buffer(exchange, "fp32", chunks) as buffer:
            outputs.append(it.run(buffer, inputs))
            buffer.check()
    return it.wrong(inputs, outputs[0]) or ("" if equal_bits(*outputs) else "other bits in chunks")


def graphs(world: World) -> str:
    """A call in a graph, in one piece and in chunks: replays give the bits of eager calls, whatever is staged."""
    it, problems = here(world), []
    for chunks in (1, 3):
        with it.buffer("auto", "bf16", chunks) as buffer:
            buffer.prepare()
            y = torch.empty(64, it.shape.hidden, dtype=torch.bfloat16, device=it.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                mm.fp8_mega_moe_multinode(y, it.l1, it.l2, buffer, 64, CLAMP)
            for seed in range(4):
                inputs = it.inputs(64, seed)
                eager = it.run(buffer, inputs, 64)
                inputs.stage(buffer)
                y.fill_(float("nan"))
                graph.replay()
                buffer.check()
                problems += [] if equal_bits(y, eager) else [f"chunks {chunks}, replay {seed}: other bits"]
            problems += [f"chunks {chunks}: {said}"] if (said := it.wrong(inputs, y)) else []
            del graph
    return "; ".join(problems)


def module(world: World) -> str:
    """`MegaMoE` with a topology: bf16 in and out, two layers with one buffer."""
    it, inputs = here(world), here(world).inputs(100)
    layers = [
        mm.MegaMoE(*it.pairs, topk=it.shape.topk, max_tokens=CAPACITY, clamp=CLAMP, topology=it.topology)
        for _ in range(2)
    ]
    shared = layers[0].buffer is layers[1].buffer
    problems = [] if shared else ["two buffers"]
    for layer in layers:
        y = layer(inputs.x, inputs.topk_idx, inputs.topk_weights, 128)
        layer.check()
        problems += [said] if (said := it.wrong(inputs, y)) else []
    for layer in layers:
        layer.destroy()
    return "; ".join(problems)


def apart(world: World) -> str:
    """Dispatch and combine on a stream of their own, as an engine has them that overlaps two halves of a batch."""
    it, side = here(world), torch.cuda.Stream()
    inputs = [it.inputs(50, seed) for seed in (1, 2)]
    with it.buffer("gather", "bf16", 2) as buffer:
        wanted = [it.run(buffer, each, 64) for each in inputs]
        buffer.check()
        outputs = [torch.empty_like(y) for y in wanted]
        under_way = []
        for each in inputs:
            each.stage(buffer)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                under_way.append(buffer.dispatch(50, 64))
            torch.cuda.current_stream().wait_stream(side)
        sms = torch.cuda.get_device_properties(it.device).multi_processor_count - buffer.comm_ctas
        for brought, y in zip(under_way, outputs, strict=True):
            buffer.compute(brought, it.l1, it.l2, activation_clamp=CLAMP, num_sms=sms)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                buffer.combine(brought, y)
        torch.cuda.current_stream().wait_stream(side)
        buffer.check()
    return "" if all(map(equal_bits, outputs, wanted)) else "other bits"


def stress(world: World) -> str:
    """Chunks that overlap, with other delays and tokens on each rank: the bits of calls in one piece, every round."""
    it, mine = here(world), random.Random(world.rank)
    pool = [it.inputs(tokens, tokens) for tokens in (0, 1, 257, CAPACITY)]
    with it.buffer("gather") as plain, it.buffer("auto", "bf16", 4) as chunked:
        wanted = [it.run(plain, inputs) for inputs in pool]
        plain.check()
        outputs = []
        for _ in range(ROUNDS):
            pick = mine.randrange(len(pool))
            if mine.random() < 0.5:
                torch.cuda._sleep(mine.randint(1, 3_000_000))
            outputs.append((pick, it.run(chunked, pool[pick])))
        chunked.check()
        problems = [f"round {i}" for i, (pick, y) in enumerate(outputs) if not equal_bits(y, wanted[pick])]
    return "other bits: " + ", ".join(problems) if problems else ""


def one_node(world: World) -> str:
    """All ranks as one node: the bits of `fp8_mega_moe` on the same ranks."""
    it, inputs = NodeRank(world, world.ranks), here(world).inputs(90)
    sizes = it.shape.experts, CAPACITY, it.shape.topk, it.shape.hidden, it.shape.intermediate
    with it.buffer() as buffer, mm.get_symm_buffer_for_mega_moe(dist.group.WORLD, *sizes, device=it.device) as plain:
        y, other = it.run(buffer, inputs), torch.empty(90, it.shape.hidden, dtype=torch.bfloat16, device=it.device)
        inputs.stage(plain)
        mm.fp8_mega_moe(other, it.l1, it.l2, plain, activation_clamp=CLAMP)
        plain.check()
        buffer.check()
    return "" if equal_bits(y, other) else "other bits"


CHECKS = {
    "every way": every_way,
    "float32": float32,
    "graphs": graphs,
    "module": module,
    "apart": apart,
    "stress": stress,
    "one node": one_node,
}
