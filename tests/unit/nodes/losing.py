"""A rank that stands still, and one that is killed, over gloo; `test_gloo` looks at what the others saw."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from megamoe_jit._check.spawn import World
from megamoe_jit._errors import PeerTimeoutError
from megamoe_jit._layer.group import gather
from megamoe_jit._nodes.calls import fp8_mega_moe_multinode
from megamoe_jit._nodes.topology import NodeTopology
from tests.unit.nodes.world import SHAPE, batch, buffer_of, of_node, stage, whole_weights

TIMEOUT_S, MORE_S = 3.0, 10.0  #: how long a rank is waited for, and how much longer it may take to say so


def calls_until_lost(topology: NodeTopology, exchange: str, loses, weights) -> dict[str, object]:
    """Calls on every rank, where one does something to itself before the second; what the others see of it."""
    buffer = buffer_of(topology, exchange=exchange, timeout_s=TIMEOUT_S)
    l1, l2 = of_node(weights, buffer.first_expert, buffer.local_experts)
    stage(buffer, batch(2, "spread", seed=topology.rank))
    y = torch.empty(2, SHAPE.hidden, dtype=torch.bfloat16)
    fp8_mega_moe_multinode(y, l1, l2, buffer)
    dist.barrier()
    loses()
    began, seen = time.monotonic(), {}
    try:
        fp8_mega_moe_multinode(y, l1, l2, buffer)
    except PeerTimeoutError as error:
        seen = {"said": str(error), "seconds": time.monotonic() - began}
    try:
        buffer.check()
    except PeerTimeoutError as error:
        seen["again"] = str(error)
    began = time.monotonic()
    buffer.destroy()
    seen["destroyed in"] = time.monotonic() - began
    return seen


def in_turn(world: World) -> dict[str, object]:
    """Rank 3 stands still, and goes on when all have noticed; then rank 2 is killed. What this rank saw of both."""
    weights, seen = whole_weights(), {}
    others = dist.new_group([0, 1, 2])
    processes = gather(dist.group.WORLD, os.getpid())
    topology = NodeTopology(dist.group.WORLD, ranks_per_node=1)
    stop = lambda: os.kill(os.getpid(), signal.SIGSTOP) if world.rank == 3 else None  # noqa: E731
    seen["stopped"] = calls_until_lost(topology, "gather", stop, weights)
    if world.rank != 3:
        dist.barrier(others)  # all have asked who is there
    if world.rank == 0:
        os.kill(processes[3], signal.SIGCONT)
    dist.barrier()
    topology = NodeTopology(dist.group.WORLD, ranks_per_node=1)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL) if world.rank == 2 else None  # noqa: E731
    seen["killed"] = calls_until_lost(topology, "exact", kill, weights)
    return seen
