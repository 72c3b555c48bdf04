"""A rank that stands still, and one that is killed: the others say so in time, and by name; over gloo."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megamoe_jit._check.spawn import World, describe, run_ranks
from megamoe_jit._errors import PeerTimeoutError
from megamoe_jit._layer.group import gather
from megamoe_jit._nodes import calls as _calls
from megamoe_jit._nodes.calls import fp8_mega_moe_multinode
from megamoe_jit._nodes.topology import NodeTopology
from tests.ranks import forked
from tests.unit.nodes.test_gloo import buffer_of
from tests.unit.nodes.world import SHAPE, batch, of_node, on_cpu, stage, whole_weights

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
RANKS, TIMEOUT_S, MORE_S = 4, 3.0, 10.0  #: how long a rank is waited for, and how much longer it may take to say so


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


def on_each_rank(world: World) -> dict[str, object]:
    """Rank 3 stands still, and goes on when all have noticed; then rank 2 is killed."""
    _calls.place_of = torch.device
    weights, seen = whole_weights(), {}
    others = dist.new_group([0, 1, 2])
    processes = gather(dist.group.WORLD, os.getpid())
    with on_cpu():
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


@pytest.fixture(scope="module")
def seen():
    """What each rank saw but the one that was killed."""
    options = {"device": "cpu", "timeout_s": 120, "group_timeout_s": 60, "grace_s": 60, "losses": 1}
    with forked():
        ends = run_ranks("tests.unit.nodes.test_loss:on_each_rank", RANKS, **options)
    assert [end.ok for end in ends] == [True, True, False, True], describe(ends)
    return {rank: end.result for rank, end in enumerate(ends) if end.ok}


@pytest.mark.parametrize(("what", "lost"), [("stopped", 3), ("killed", 2)])
def test_every_other_rank_says_in_time_which_node_and_rank_is_lost(seen, what: str, lost: int):
    for rank, each in seen.items():
        if rank == lost:
            continue
        it = each[what]
        assert it["said"].startswith(f"node {rank} (rank {rank}): in call 2 between nodes, rows did not get through: ")
        assert f"(missing: node {lost} (rank {lost}): its process is gone or stands still)" in it["said"]
        assert it["seconds"] < TIMEOUT_S + MORE_S
        assert it["again"] == it["said"], "the buffer stays as it is"
        assert it["destroyed in"] < 1.0, "nobody is waited for"


def test_one_that_goes_on_finds_its_call_lost_as_well(seen):
    assert "in call 2 between nodes, rows did not get through" in seen[3]["stopped"]["said"]
