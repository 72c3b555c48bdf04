"""Waiting for the GPU without waiting for ever.

A kernel that gives up leaves a record in host memory and ends itself by a fault, and the driver then ends every wait of
the host with an error.  But a driver can lose a fault (`kernels_src/comm/fault.cuh` has figures): then
`torch.cuda.synchronize` never returns.  The record is there all the same, so whoever waits looks at it.

The wait itself is done by a thread that is kept for the next one.  Python 3.12 makes no new threads once the program
has ended, but functions registered with `atexit` may still destroy a layer then: `be_ready` is called before that.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from megamoe_jit._device.fault import LOST
from megamoe_jit._text import first_line

GRACE_S = 10.0  #: for the driver to report a fault after its record was seen; it was never seen to take more than 4
LOOK_S = 0.05  #: between two looks at the record


class _Wait:
    """One wait for a device: over or not, and how it ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.over = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        """Wait, however long it takes; `over` is for the caller to set."""
        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:
            self.error = error


class _Waiter:
    """A thread that waits for devices, one after the other."""

    def __init__(self) -> None:
        self.todo: SimpleQueue[_Wait] = SimpleQueue()
        threading.Thread(target=self._serve, name="megamoe-jit waits for the GPU", daemon=True).start()

    def _serve(self) -> None:
        while True:
            wait = self.todo.get()
            wait.run()
            _idle.append(self)  # first, so that who waits again at once finds this one
            wait.over.set()


_idle: list[_Waiter] = []  #: those with nothing to do; append and pop are atomic
os.register_at_fork(after_in_child=_idle.clear)  # a child has none of the threads


def be_ready() -> None:
    """See that there is a thread for a wait after the end of the program, when none can be started."""
    if not _idle:
        with contextlib.suppress(RuntimeError):  # it has ended already
            _idle.append(_Waiter())


def _begin(device: torch.device) -> _Wait:
    wait = _Wait(device)
    try:
        waiter = _idle.pop()
    except IndexError:
        try:
            waiter = _Waiter()
        except RuntimeError:  # the program has ended, and waits that may last for ever have all threads
            wait.run()
            wait.over.set()
            return wait
    waiter.todo.put(wait)
    return wait


def wait_for_device(
    device: torch.device, has_record: Callable[[], bool], give_up: Callable[[], str | None] | None = None
) -> str | None:
    """Wait for all work on the device; the first line of the driver's error, or None if there is none.

    Where a record appears and the driver has reported nothing after `GRACE_S`, return `LOST`. What `give_up` says ends
    the wait as well, and is returned.
    """
    wait = _begin(device)
    while not wait.over.wait(LOOK_S):
        said = give_up() if give_up is not None else None
        if said is not None:
            return said
        if has_record() and not wait.over.wait(GRACE_S):
            return LOST
    if wait.error is not None and not isinstance(wait.error, RuntimeError):
        raise wait.error
    return first_line(wait.error) if wait.error else None
