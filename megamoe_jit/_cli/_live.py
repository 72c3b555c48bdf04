"""The live display of compiling: one line per kernel, redrawn in place, on a terminal that can do so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from megamoe_jit._spec.compilable import Compilable

_COLOURS = {"compiled": "green", "cached": "cyan", "failed": "red", "working": "yellow"}
_MARGIN = 2  #: lines of the terminal left free


def _all_fitting(names: Sequence[str], room: int) -> dict[str, str]:
    """What to show for each name; those that would look the same are numbered."""
    shown = {name: _fitting(name, room) for name in names}
    if len(set(shown.values())) == len(shown):
        return shown
    marks = {name: f"{number}:" for number, name in enumerate(shown, start=1)}
    return {name: f"{mark}{_fitting(name, room - len(mark))}" for name, mark in marks.items()}


def _fitting(name: str, room: int) -> str:
    """The name, or on a narrow terminal what tells it from others: its end says more than its beginning."""
    if len(name) <= room:
        return name
    name = name.removeprefix("megamoe_")
    head = 4
    return name if len(name) <= room else f"{name[:head]}…{name[-max(1, room - head - 1) :]}"


class LiveKernels:
    """Kernels of a warmup and what became of them so far.

    Kernels are handed to the workers in order, so the first unfinished ones are those being worked on.

    Args:
        specs: the kernels, in the order in which they are handed out.
        jobs: workers.
        console: where to draw.
    """

    def __init__(self, specs: Sequence[Compilable], jobs: int, console: Console) -> None:
        self._console = console
        self._names = [spec.kernel_name for spec in specs]
        self._done: dict[str, tuple[str, float]] = {}
        self._started: dict[str, float] = {}
        self._jobs = jobs
        self._begin = time.perf_counter()
        self._start_next()

    def finish(self, name: str, status: str, seconds: float) -> None:
        """Note the result of one kernel."""
        self._done[name] = (status, seconds)
        self._start_next()

    def _start_next(self) -> None:
        open_ = [name for name in self._names if name not in self._done]
        for name in open_[: self._jobs]:
            self._started.setdefault(name, time.perf_counter())

    def _line(self, name: str) -> Text:
        from rich.text import Text

        if name in self._done:
            status, seconds = self._done[name]
            shown = f"{seconds:7.2f} s"
        elif name in self._started:
            status, shown = "working", f"{time.perf_counter() - self._started[name]:7.1f} s"
        else:
            status, shown = "waiting", ""
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{status:8}", style=_COLOURS.get(status, ""))
        room = self._console.size.width - len(f"{status:8}    {shown}")
        return line.append(f"  {_all_fitting(self._names, room)[name]}  {shown}".rstrip())

    def _shown(self, room: int) -> tuple[list[str], int]:
        """The kernels to show in so many lines, and how many are left out: finished first, then waiting."""
        excess = len(self._names) - room
        if excess <= 0:
            return self._names, 0
        room -= 1  # for the line that says how many are left out
        working = [n for n in self._names if n in self._started and n not in self._done]
        waiting = [n for n in self._names if n not in self._started]
        finished = [n for n in self._names if n in self._done]
        kept = set(working[:room])
        for group in (waiting[:1], list(reversed(finished)), waiting):
            for name in group:
                if len(kept) < room:
                    kept.add(name)
        return [n for n in self._names if n in kept], len(self._names) - len(kept)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        names, left_out = self._shown(max(3, self._console.size.height - _MARGIN))
        lines = [self._line(name) for name in names]
        if left_out:
            lines.append(Text(f"and {left_out} more"))
        failed = sum(status == "failed" for status, _ in self._done.values())
        tail = f"{len(self._done)} of {len(self._names)} done" + (f", {failed} failed" if failed else "")
        lines.append(Text(f"{tail}, {time.perf_counter() - self._begin:.1f} s"))
        return Group(*lines)
