"""What ranks do in a test that kills one of them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.spawn import World
from tests.multi.worker import Rank, shape_for

SIZES = (4096, 4096, 8, 2)  #: on one SM a launch of 4096 tokens takes some 50 ms
CAPACITY = 4096
GOOD_ROUNDS = 3  #: launches before the one that is in question
STALL_CYCLES = 4_000_000_000  #: about two seconds


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _victim(it: Rank, when: str) -> None:
    """The end of the rank that is lost."""
    if when in ("before", "between"):
        _die()
    if when == "stalled":  # its launch waits in the stream behind something long
        torch.cuda._sleep(STALL_CYCLES)
        it.call(CAPACITY)
        time.sleep(0.3)
        _die()
    it.call(CAPACITY, num_sms=1)  # computing
    time.sleep(0.01)
    _die()


def _survivor(it: Rank, when: str) -> dict[str, Any]:
    if when in ("before", "between"):
        time.sleep(1.0)  # it is gone for certain
    y, later = it.poisoned(CAPACITY), it.poisoned(10)  # nothing can be allocated once the context is broken
    begin = time.perf_counter()
    found: dict[str, Any] = {"error": None, "text": ""}
    try:
        it.call(CAPACITY, y=y)
        it.buffer.check()
    except mm.MegaMoeError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    found["seconds"] = time.perf_counter() - begin
    try:
        it.call(10, y=later)
        found["later"], found["later_text"] = None, ""
    except mm.MegaMoeError as error:
        found["later"], found["later_text"] = type(error).__name__, str(error)
    begin = time.perf_counter()
    it.buffer.destroy()
    it.buffer.destroy()
    found["destroy_seconds"] = time.perf_counter() - begin
    return found


def run(world: World, when: str, victim: int) -> dict[str, Any] | None:
    """Some good launches (none if it is lost before the first), then one rank is lost.

    Args:
        world: this rank.
        when: `before` any launch, `between` launches, `stalled` before its launch begins, `computing` in a launch.
        victim: the rank that is lost.
    """
    it = Rank(world.rank, world.ranks, world.device, shape_for(world.ranks, *SIZES), CAPACITY)
    it.stage(it.some(CAPACITY))
    it.buffer.prepare("cooperative")
    if when != "before":
        for _ in range(GOOD_ROUNDS):
            it.call(CAPACITY)
        it.buffer.check()
    torch.cuda.synchronize()
    dist.barrier(group=dist.new_group(backend="gloo"))
    if world.rank == victim:
        _victim(it, when)
    return _survivor(it, when)
