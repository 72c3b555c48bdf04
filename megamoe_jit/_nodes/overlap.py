"""Chunks of a call: rows of one travel while another is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def overlapped(
    chunks: int,
    bring: Callable[[int], None],
    launch: Callable[[int], None],
    finish: Callable[[int], None],
    stream: Any,
) -> None:
    """Dispatch, compute and combine of each chunk: what travels on `stream`, kernels on the current one.

    Two chunks are under way at a time, each in memory of its own. The order of what travels is the same on every rank,
    since a collective that comes first on one and second on another would have both wait for ever.

    Args:
        chunks: how many, 1 or more.
        bring, launch, finish: the three parts of one, by number.
        stream: a `torch.cuda.Stream`; None on a CPU, where one thing follows the other.
    """
    if stream is None:
        bring(0)
        for i in range(chunks):
            launch(i)
            if i + 1 < chunks:
                bring(i + 1)
            finish(i)
        return
    main = torch.cuda.current_stream(stream.device)
    stream.wait_stream(main)  # inputs, and the memory of the last call
    brought, computed = _events(chunks), _events(chunks)

    def begin(i: int) -> None:
        if i >= chunks:
            return
        with torch.cuda.stream(stream):
            if i >= 2:
                stream.wait_event(computed[i - 2])  # which was in the same memory
            bring(i)
            brought[i].record(stream)

    begin(0)
    for i in range(chunks):
        main.wait_event(brought[i])
        launch(i)
        computed[i].record(main)
        begin(i + 1)  # after the launch: if the host waits for counts in it, the kernel is at work meanwhile
        with torch.cuda.stream(stream):
            stream.wait_event(computed[i])
            finish(i)
    main.wait_stream(stream)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event() for _ in range(count)]  # type: ignore[no-untyped-call]
