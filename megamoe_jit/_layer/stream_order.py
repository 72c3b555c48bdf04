"""`StreamOrder`: launches that use one memory come one after the other, whatever streams they are on."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from megamoe_jit._device.capture import capture_id


class _Last:
    """The stream of the last launch, after which the next one comes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None
        self.handle: int | None = None  # of a stream whose next launch needs no word
        self.captured: dict[int, torch.cuda.Stream] = {}  # of the last launch in each capture that goes on


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

        While a graph is being captured that is the last launch in the same graph, so that its branches take turns; its
        replays are for the caller to order with other calls on the memory.
        """
        stream, last = torch.cuda.current_stream(self._device), self._last
        if torch.cuda.is_current_stream_capturing():
            self._enter_capture(stream)
            return
        if last.stream is not None and stream.cuda_stream != last.stream.cuda_stream:
            stream.wait_stream(last.stream)
        for memory in memories:
            memory.record_stream(stream)
        self._known.add(stream.cuda_stream)
        last.stream, last.handle = stream, stream.cuda_stream

    def _enter_capture(self, stream: torch.cuda.Stream) -> None:
        capture, last = capture_id(stream.cuda_stream), self._last
        if capture is None:
            return
        going_on = {number: each for number, each in last.captured.items() if capture_id(each.cuda_stream) == number}
        before = going_on.get(capture)
        if before is None and last.stream is not None and capture_id(last.stream.cuda_stream) == capture:
            before = last.stream  # which may have launched in this capture without a word
        if before is not None and before.cuda_stream != stream.cuda_stream:
            stream.wait_stream(before)
        last.captured = {**going_on, capture: stream}
        last.handle = None  # from here on every launch has to ask
