"""`RollCall`: who is there. When an exchange fails, it says which ranks are gone, stand still, or are behind.

Each rank notes once a second, in the store of the process group, that it lives, and how many calls it has made. A
process that is killed or stopped notes nothing any more; one that hangs in the program notes no further call.
Collectives themselves do not tell: to them everybody who waits looks alike.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
import time
import weakref
from typing import Any

from megamoe_jit._layer.group import gather, group_rank, group_size

BEAT_S = 1.0
LISTEN_S = 3.5  #: a beat may be late by so much, of a process that is busy
LAST_BEAT_S = 3.0  #: for those that are under way when the program ends

_last = [0]  #: number of the last roll call that was made in this process
_beating: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


@atexit.register
def _fall_silent() -> None:
    """End the threads before the interpreter does, which aborts the process if one comes out of the store meanwhile."""
    for over in list(_beating.values()):
        over.set()
    end = time.monotonic() + LAST_BEAT_S  # of all: where the store does not answer, none of them comes back
    for thread in list(_beating):
        thread.join(max(0.0, end - time.monotonic()))


class RollCall:
    """The ranks of a process group, counted; a collective of all of them.

    Attributes:
        calls: how many this rank has made.
    """

    def __init__(self, group: Any) -> None:
        self.calls = 0
        self.rank, self.ranks = group_rank(group), group_size(group)
        self._store: Any = None
        self._over = threading.Event()
        if self.ranks == 1:
            return
        numbers = gather(group, (_last[0] + 1, os.getpid()))
        _last[0] = max(number for number, _ in numbers)  # the same on all ranks, and another one each time
        self._store = _store(f"megamoe_jit/roll_call/{_last[0]}/{numbers[0][1]}")
        if self._store is not None:
            arguments = weakref.ref(self), self._store, self.rank, self._over
            thread = threading.Thread(target=_beat, args=arguments, name="megamoe-jit roll call", daemon=True)
            _beating[thread] = self._over
            thread.start()
        weakref.finalize(self, self._over.set)

    def give_notice(self) -> None:
        """Tell the others that this rank has found a loss; if it ends because of that, it is not the one they miss."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone
                self._store.set(f"notice/{self.rank}", "")

    def missing(self) -> dict[int, str] | None:
        """Ranks that are not where this one is, and why; None if that cannot be told. Takes `LISTEN_S`."""
        if self._store is None:
            return None
        try:
            before = [_read(self._store, rank) for rank in range(self.ranks)]
            time.sleep(LISTEN_S)
            after = [_read(self._store, rank) for rank in range(self.ranks)]
            noticed = [self._store.check([f"notice/{rank}"]) for rank in range(self.ranks)]
        except RuntimeError:  # the store is gone, with the process that had it
            return None
        found = {}
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            if rank == self.rank or noticed[rank]:
                continue
            if old[0] == new[0]:
                found[rank] = "its process is gone or stands still"
            elif new[1] < self.calls:
                found[rank] = f"it has made {new[1]} calls of {self.calls}"
        return found


def _store(prefix: str) -> Any:
    """The store by which torch's ranks met, None where this torch has no such."""
    from torch.distributed import distributed_c10d

    default = getattr(distributed_c10d, "_get_default_store", None)
    if default is None:
        return None
    store = distributed_c10d.PrefixStore(prefix, default())
    # a connection of its own where it can be had: on that of torch, beats wait for whatever torch waits for
    return store.clone() if hasattr(store, "clone") else store


def _read(store: Any, rank: int) -> tuple[int, int]:
    """Beats and calls of a rank."""
    if not store.check([str(rank)]):
        return 0, 0
    beats, calls = store.get(str(rank)).split()
    return int(beats), int(calls)


def _beat(it: weakref.ref[RollCall], store: Any, rank: int, over: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the store is gone
        for number in itertools.count(1):
            alive = it()
            if alive is None:
                return
            store.set(str(rank), f"{number} {alive.calls}")
            del alive
            if over.wait(BEAT_S):
                return
