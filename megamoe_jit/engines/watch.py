"""A kernel that gave up, said in an engine's log, where nothing else says more than that the CUDA context is broken."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any, NamedTuple

import torch

from megamoe_jit._device.fault import decode, fault_error
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit.engines.aside import LOG

_SECONDS = 0.2


class _Record(NamedTuple):
    """What a kernel of a buffer writes before it ends itself."""

    words: Any  #: its memory by address: the interpreter may end a thread, and should not do so inside of torch
    rank: int
    memory: torch.Tensor  #: kept, since kernels may write it as long as the process lives


_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_watched: list[_Record] = []


def watch(buffer: SymmBuffer) -> None:
    """Log an error within half a second of a kernel of this buffer that gives up.

    The record lies in the host's memory, so looking at it asks nothing of the GPU, in a capture neither.

    Args:
        buffer: of layers of an engine; it may come here for each of them.
    """
    with _lock:
        if any(record.memory is buffer.fault for record in _watched):
            return
        words = (ctypes.c_int32 * buffer.fault.numel()).from_address(buffer.fault.data_ptr())
        _watched.append(_Record(words, buffer.rank, buffer.fault))
        if len(_watched) == 1:
            threading.Thread(target=_look, name="megamoe-jit-watch", daemon=True).start()


def _look() -> None:
    told: set[int] = set()
    while True:
        time.sleep(_SECONDS)
        for record in tuple(_watched):
            if record.words[0] and id(record) not in told:
                told.add(id(record))
                time.sleep(_SECONDS)  # until the rest of it is there
                LOG.error("%s", fault_error(decode(record.words), record.rank, None))
