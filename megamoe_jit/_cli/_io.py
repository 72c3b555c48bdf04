"""What commands print: JSON documents, plain tables, talk on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import click

__all__ = [
    "SCHEMA_VERSION",
    "ExitCode",
    "document",
    "emit_json",
    "human_bytes",
    "json_option",
    "progress_line",
    "say",
    "table",
]

SCHEMA_VERSION = 1  #: of every JSON document; raised when a field changes its meaning or goes away


class ExitCode(IntEnum):
    """How a command ends."""

    OK = 0
    FAILED = 1  #: a kernel failed to compile, a scenario failed, ...
    USAGE = 2  #: wrong arguments, an unknown shape, ...
    ENVIRONMENT = 3  #: no NVRTC, no Hopper GPU, ...
    INTERRUPTED = 130


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on standard output instead of text."
)


def say(message: str = "") -> None:
    """Talk: a line on standard error."""
    click.echo(message, err=True)


def document(kind: str, **fields: Any) -> dict[str, Any]:
    """The envelope of every JSON document; sizes in bytes, times in seconds unless a name says otherwise."""
    return {"schema_version": SCHEMA_VERSION, "kind": kind, **fields}


def emit_json(doc: dict[str, Any]) -> None:
    """Print `doc` on standard output."""
    click.echo(json.dumps(doc, indent=2, default=str))


def human_bytes(count: int) -> str:
    """`count` bytes in a unit a reader can compare: 932 B, 41.6 KiB, 1.2 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A plain table: columns whose numbers are in `left` are aligned to the left, the rest to the right."""
    cells = [[str(c) for c in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def progress_line(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with one line per finished step.

    On a terminal the lines scroll above a live count; elsewhere they are plain lines: on standard error.
    """
    if not sys.stderr.isatty():
        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, markup=False)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def step(line: str) -> None:
            console.print(line)
            bar.advance(task)

        yield step
