"""Several nodes on a CPU: the experts of a node by the reference, rails between threads with a ledger, and cases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._layer.memory import mask_rows
from megamoe_jit._layer.quantize import quantize_activations
from megamoe_jit._nodes import memory as _memory
from megamoe_jit._nodes.along_rails import ExactExchange, GatherExchange
from megamoe_jit._nodes.buffer import MultiNodeBuffer
from megamoe_jit._nodes.calls import get_multinode_buffer_for_mega_moe
from megamoe_jit._nodes.choice import Choices, Rule
from megamoe_jit._nodes.exchange import Rows
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit.reference import moe_reference

SHAPE = MoEShape(256, 128, 16, 4)
CPU = torch.device("cpu")
GARBAGE = 0x7B
ROUTES = ("spread", "hot", "one node", "duplicates", "masked", "no expert")


def by_row(rows: Rows, l1: Any, l2: Any, clamp: float | None, dtype: torch.dtype) -> torch.Tensor:
    """The reference, a row at a time: products on a CPU have other bits in larger batches, kernels have not."""
    y = torch.zeros(len(rows), rows.x.shape[1], dtype=dtype)
    real = ((rows.topk_idx >= 0) & (rows.topk_idx < l1[0].shape[0])).any(dim=1)
    for row in real.nonzero().flatten().tolist():
        one = rows[row : row + 1].tensors
        y[row] = moe_reference(*one, l1, l2, activation_clamp=clamp, out_dtype=dtype)
    return y


class ReferenceExperts:
    """`Experts` by the reference: a node's rows of this rank, and the weights of all its experts as plain pairs.

    It stands in for their buffer too.
    """

    def __init__(self, shape, max_rows, device, group, max_pool_rows, dtype=torch.bfloat16) -> None:
        self.shape, self.dtype, self.launches = shape, dtype, []
        codes = torch.full((max_rows, shape.hidden), GARBAGE, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = torch.full((max_rows, shape.hidden // 128), float("nan"))
        ids = torch.zeros(max_rows, shape.topk, dtype=torch.int64)
        self.rows = Rows(codes, scales, ids, torch.full((max_rows, shape.topk), float("nan")))
        self.buffer, self.broken = self, None

    def check_call(self, rows, l1, l2, options) -> None:
        assert l1[0].shape[0] == l2[0].shape[0] == self.shape.experts

    def prepare(self, fast_math, weights, most) -> None:
        pass

    def variant_for(self, rows, options) -> str:
        return options.variant or "pingpong"

    def sms_beside(self, comm_ctas) -> int:
        return 132 - comm_ctas

    def wait_for_last(self) -> None:
        pass

    def compute(self, arrived, partial, l1, l2, options) -> None:
        rows = self.rows[: arrived.rows]
        if arrived.num_rows is not None:
            mask_rows(rows.topk_idx, arrived.num_rows)
        self.launches.append((arrived.rows, options))
        clamp = None if options.clamp == float("inf") else options.clamp
        partial.copy_(by_row(rows, l1, l2, clamp, partial.dtype))

    def has_fault(self) -> bool:
        return False

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken

    def poison(self, error) -> None:
        self.broken = error

    def destroy(self) -> None:
        pass


@contextmanager
def on_cpu() -> Iterator[None]:
    """Buffers of several nodes have `ReferenceExperts`."""
    with mock.patch.object(_memory, "Experts", ReferenceExperts):
        yield


def whole_weights(shape: MoEShape = SHAPE, weights: WeightFormat = FP8) -> Any:
    """Of all experts, as plain pairs."""
    return make_weights(shape, "cpu", weights=weights)


def of_node(weights: Any, first: int, experts: int) -> tuple[Any, Any]:
    """Those that a node has."""
    part = slice(first, first + experts)
    return tuple((codes[part], scales[part]) for codes, scales in (weights.l1, weights.l2))  # type: ignore[return-value]


def batch(tokens: int, route: str, seed: int, shape: MoEShape = SHAPE, nodes: int = 2) -> Rows:
    """Tokens of one rank, routed so."""
    gen = torch.Generator().manual_seed(seed)
    x, x_sf = quantize_activations(torch.randn(tokens, shape.hidden, generator=gen))
    ids = torch.rand(tokens, shape.experts, generator=gen).topk(shape.topk).indices
    weights = torch.rand(tokens, shape.topk, generator=gen)
    if route == "hot":
        ids[:, 0] = shape.experts - 1
    elif route == "one node":
        ids %= shape.experts // nodes
    elif route == "duplicates":
        ids[:, 1:] = ids[:, :1]
    elif route == "masked":
        ids[:] = -1
        weights[:] = float("nan")  # nobody may read them
    elif route == "no expert":
        ids[:, 0], ids[:, 1], ids[::2, 2] = shape.experts, -(2**62), -1
    return Rows(x, x_sf, ids, weights)


def stage(buffer: MultiNodeBuffer, rows: Rows) -> None:
    """Into the views, with garbage past the tokens."""
    for view, value in zip((buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights), rows.tensors, strict=True):
        view[: len(rows)].copy_(value)
        past = view[len(rows) :]
        if view is buffer.topk_idx:
            past.fill_(1)  # an expert
        else:
            past.view(torch.uint8).fill_(GARBAGE)


def expected(rows: Rows, weights: Any, nodes: int, dtype: torch.dtype, shape: MoEShape = SHAPE) -> torch.Tensor:
    """What the layer is defined to give: each node's part in `dtype`, and their sum in FP32, node 0 first."""
    each, total = shape.experts // nodes, torch.zeros(len(rows), shape.hidden)
    for node in range(nodes):
        here = (rows.topk_idx >= node * each) & (rows.topk_idx < (node + 1) * each)
        ids = torch.where(here, rows.topk_idx, -1)
        part = by_row(Rows(rows.x, rows.x_sf, ids, rows.topk_weights), weights.l1, weights.l2, None, dtype)
        total = total + part.float()
    return total.to(torch.bfloat16)


class Ledger:
    """Bytes that left each rank for other nodes, by what they were."""

    def __init__(self, ranks: int) -> None:
        self.sent: list[dict[str, int]] = [{} for _ in range(ranks)]

    def note(self, rank: int, what: str, count: int) -> None:
        self.sent[rank][what] = self.sent[rank].get(what, 0) + count


class Meeting:
    """Where the threads of one rail meet."""

    def __init__(self, ranks: int) -> None:
        self.slots: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)

    def exchange(self, place: int, value: Any) -> list[Any]:
        self.slots[place] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


class ThreadRail:
    """A `TorchRail` between threads."""

    def __init__(self, meeting: Meeting, node: int, rank: int, ledger: Ledger) -> None:
        self.meeting, self.nodes, self.node, self.rank, self.ledger = (
            meeting,
            meeting.barrier.parties,
            node,
            rank,
            ledger,
        )
        self.timeout_s = 60.0

    def gather(self, outputs, inputs) -> None:
        everyone = self.meeting.exchange(self.node, [tensor.clone() for tensor in inputs])
        self.ledger.note(self.rank, "gather", (self.nodes - 1) * sum(tensor.nbytes for tensor in inputs))
        for i, output in enumerate(outputs):
            whole = torch.cat([theirs[i].view(torch.uint8) for theirs in everyone])
            output.view(torch.uint8).copy_(whole.view(output.view(torch.uint8).shape))

    def swap(self, output, given, arriving=None, leaving=None) -> None:
        leaving = list(leaving) if leaving is not None else [given.shape[0] // self.nodes] * self.nodes
        parts = [part.clone() for part in given.split(leaving)]
        everyone = self.meeting.exchange(self.node, parts)
        self.ledger.note(self.rank, "swap", sum(p.nbytes for n, p in enumerate(parts) if n != self.node))
        mine = torch.cat([theirs[self.node] for theirs in everyone])
        assert arriving is None or [theirs[self.node].shape[0] for theirs in everyone] == list(arriving)
        output.copy_(mine.view(output.dtype))

    def counts(self, mine):
        everyone = self.meeting.exchange(self.node, mine.tolist())
        return lambda: everyone

    def error(self, device) -> None:
        return None

    def abort(self, device) -> None:
        pass


def thread_world(nodes: int, ranks_per_node: int, action: Callable[[Any, ThreadRail, Ledger], Any]) -> list[Any]:
    """What `action` gives on every rank, each a thread; called with a topology, a rail, and the ledger."""
    world = nodes * ranks_per_node
    rails, ledger = [Meeting(nodes) for _ in range(ranks_per_node)], Ledger(world)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        node, local = divmod(rank, ranks_per_node)
        topology = SimpleNamespace(
            group=None, node_group=None, nodes=nodes, node=node, ranks_per_node=ranks_per_node, local_rank=local,
            world_size=world, rank=rank, roll_call=SimpleNamespace(calls=0, missing=dict, give_notice=lambda: None),
            place_of=lambda r: f"node {r // ranks_per_node} (rank {r})",
        )  # fmt: skip
        try:
            results[rank] = action(topology, ThreadRail(rails[local], node, rank, ledger), ledger)
        except BaseException as error:
            results[rank] = error
            rails[local].barrier.abort()

    with on_cpu():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def buffer_of(topology: Any, capacity: int = 8, **more: Any) -> MultiNodeBuffer:
    """A buffer of the layer, as callers get it."""
    sizes = SHAPE.experts, capacity, SHAPE.topk, SHAPE.hidden, SHAPE.intermediate
    return get_multinode_buffer_for_mega_moe(topology, *sizes, device="cpu", **more)


def make_buffer(topology, rail, *, shape=SHAPE, capacity=24, exchange="gather", partial=torch.bfloat16, chunks=1):
    """A buffer of a thread's world."""
    both = [GatherExchange(rail), ExactExchange(rail)]
    its = both if exchange == "auto" else [it for it in both if it.name == exchange]
    rule = Rule(shape, topology.nodes, topology.ranks_per_node, exchange, partial.itemsize)
    return MultiNodeBuffer(topology, shape, capacity, CPU, Choices(its, rail, rule), partial=partial, chunks=chunks)
