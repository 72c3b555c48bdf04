"""What ranks do in a test where one of two nodes is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.spawn import World
from megamoe_jit._layer.group import gather
from tests.multi.checks_nodes import CLAMP, NodeRank

TIMEOUT_S = 3.0


def run(world: World, how: str, calls: str) -> None:
    """Some good calls, then the last rank is lost; what the first one sees of it.

    Args:
        world: this rank.
        how: `killed` or `stopped`.
        calls: by `gather`, by `exact`, where the host waits, or `replayed` by a graph, which only `check` watches.
    """
    begun = time.perf_counter()

    def say(*what: Any) -> None:
        world.report([f"{time.perf_counter() - begun:.1f} s", *what])

    it, last = NodeRank(world), world.ranks - 1
    processes = gather(dist.group.WORLD, os.getpid())
    replayed = calls == "replayed"
    buffer, inputs = it.buffer("gather" if replayed else calls, timeout_s=TIMEOUT_S), it.inputs(64)
    it.run(buffer, inputs, 64)
    y = torch.empty(64, it.shape.hidden, dtype=torch.bfloat16, device=it.device)
    graph = torch.cuda.CUDAGraph()
    if replayed:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            mm.fp8_mega_moe_multinode(y, it.l1, it.l2, buffer, 64, CLAMP)

    def call() -> None:
        if replayed:
            graph.replay()
        else:
            mm.fp8_mega_moe_multinode(y, it.l1, it.l2, buffer, 64, CLAMP)

    call()
    buffer.check()
    gather(dist.group.WORLD, None)
    say("lost now" if world.rank == last else "ready")
    if world.rank == last:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    time.sleep(1.0)
    found: dict[str, Any] = {"error": None, "text": "", "later": None}
    begin = time.perf_counter()
    try:
        call()
        buffer.check()
    except mm.MegaMoeError as error:
        found |= {"error": type(error).__name__, "text": str(error)}
    found["seconds"] = time.perf_counter() - begin
    try:
        mm.fp8_mega_moe_multinode(y, it.l1, it.l2, buffer, 64, CLAMP)
    except mm.MegaMoeError as error:
        found["later"] = type(error).__name__
    begin = time.perf_counter()
    buffer.destroy()
    found["destroy_seconds"] = time.perf_counter() - begin
    say("told", found["seconds"])
    world.report(["found", found])
    if how == "stopped":
        os.kill(processes[last], signal.SIGKILL)
    sys.stderr.flush()
    os._exit(0)  # as the page says: what NCCL has under way goes with the process
