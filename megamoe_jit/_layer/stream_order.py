"""`StreamOrder`: launches that use one memory come one after the other, whatever streams they are on."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

__all__ = ["StreamOrder"]


class _Last:
    """The stream of the last launch, after which the next one comes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None
        self.handle: int | None = None  # compared instead: torch says that no stream differs from None


_on_gpu: dict[int | None, _Last] = {}  #: of memory that several ranks share, by GPU


class StreamOrder:
    """The order of the launches on one memory.

    Memory of several ranks has one order on each GPU: two such kernels fill a GPU one after the other, and wait for
    their peers, so on all GPUs they must come in the same order.

    Args:
        device: where the memory is.
        shared: whether several ranks use it.

    Attributes:
        lock: of staging and launching, for threads that share the memory.
    """

    def __init__(self, device: torch.device, shared: bool) -> None:
        self._device = device
        self._last = _on_gpu.setdefault(device.index, _Last()) if shared else _Last()
        self.lock = self._last.lock
        self._known: set[int] = set()  # streams that the allocator knows to use the memory

    def is_next(self, stream: int) -> bool:
        """Whether a launch on this stream (its raw handle) needs no further word to come after the last one."""
        return stream == self._last.handle and stream in self._known

    def forget(self) -> None:
        """There is other memory than before: the allocator has to hear of each stream again."""
        self._known.clear()

    def enter(self, memories: Iterable[torch.Tensor]) -> None:
        """Make the current stream wait for that of the last launch, and the reuse of the memories for both.

        Not while a graph is being captured: its replays are for the caller to order with other calls on the memory.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        stream, last = torch.cuda.current_stream(self._device), self._last
        if last.stream is not None and stream.cuda_stream != last.handle:
            stream.wait_stream(last.stream)
        for memory in memories:
            memory.record_stream(stream)
        self._known.add(stream.cuda_stream)
        last.stream, last.handle = stream, stream.cuda_stream
