"""What commands print: JSON documents, plain tables, talk on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import click

from megamoe_jit._documents import Document, content, envelope
from megamoe_jit._text import one_line, printable


class ExitCode(IntEnum):
    """How a command ends."""

    OK = 0
    FAILED = 1  #: a kernel failed to compile, a scenario failed, there are findings, ...
    USAGE = 2  #: wrong arguments, an unknown shape, ...
    ENVIRONMENT = 3  #: no NVRTC, no Hopper GPU, ...
    CORRUPTION = 4  #: a damaged cache entry or pack
    INTERRUPTED = 130


class CorruptionError(click.ClickException):
    """A cache entry or a pack is damaged."""

    exit_code = ExitCode.CORRUPTION


class FullSummaries(click.Group):
    """A group whose help shows the whole first sentence of each command."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in commands])


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on standard output instead of text."
)


def say(message: str) -> None:
    """Talk: a line on standard error."""
    click.echo(printable(message), err=True)


def show(text: str = "", before: str = "") -> None:
    """Data for people: lines on standard output.

    Args:
        text: from wherever; shown without what steers a terminal.
        before: the beginning of the first line, which may be coloured.
    """
    click.echo(before + printable(text))


def copy_out(text: str, nl: bool = False) -> None:
    """Data for programs on standard output: exactly this text, byte by byte; as `show` where it is a terminal."""
    if sys.stdout.isatty():
        click.echo(printable(text), nl=nl)
    else:
        click.echo(text.encode("utf-8", "surrogateescape"), nl=nl)


def end(code: ExitCode) -> None:
    """End the command with an exit code, if it is not that of success."""
    if code is not ExitCode.OK:
        raise click.exceptions.Exit(code)


def emit(doc: Document) -> None:
    """Print a document on standard output, one field or list item per line; what is no number in JSON becomes null."""
    fields = envelope(doc).items()
    click.echo("{\n" + ",\n".join(f" {json.dumps(name)}: {_value(value)}" for name, value in fields) + "\n}")


def _value(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join(f"  {_compact(item)}" for item in value) + "\n ]"
    return _compact(value)


def _compact(value: Any) -> str:
    try:
        text = json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
        text = json.dumps(finite)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON leaves as it is


def _plain(value: Any) -> Any:
    """What JSON has no form for: parts of documents by field, paths and the like as they are written."""
    return content(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A plain table: columns whose numbers are in `left` are aligned to the left, the rest to the right."""
    columns = []
    for index, column in enumerate(zip(headers, *rows, strict=True)):
        cells = [str(cell) for cell in column]
        if not "".join(cells).isprintable():
            cells = [one_line(cell) for cell in cells]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if index in left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def facts(rows: Sequence[Sequence[object]]) -> str:
    """A table without headers, whose columns are all aligned to the left: a line for each name and value."""
    width = len(rows[0])
    return "\n".join(table(("",) * width, rows, left=range(width)).splitlines()[1:])


def cell(value: object, form: str = "", unit: str = "") -> str:
    """A value as tables have it, which may be missing."""
    return "-" if value is None else f"{value:{form}}{unit}"


def confirm(question: str, yes: bool) -> None:
    """Ask before something is deleted.

    Args:
        question: what would be deleted.
        yes: whether the command line has answered already.

    Raises:
        click.exceptions.Exit: the answer is no.
        click.UsageError: nobody is there to answer.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"Nobody can be asked here; --yes answers: {question}")
    if not click.confirm(printable(question), err=True):
        end(ExitCode.FAILED)


def must_be_writable(path: Path, option: str, *, in_new_folders: bool = False) -> None:
    """Find out before long work whether its result can be written.

    Args:
        path: a file that may exist, or a folder.
        option: what named it.
        in_new_folders: whether missing folders above it will be made.

    Raises:
        click.BadParameter: it cannot, as far as permissions tell.
    """
    place = path if os.path.exists(path) else path.absolute().parent
    while in_new_folders and not os.path.exists(place):
        place = place.parent
    is_folder = os.path.isdir(place)
    reason = ""
    if not os.path.exists(place):
        reason = f"{place} does not exist"
    elif place != path and not is_folder:
        reason = f"{place} is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK if is_folder else os.W_OK):
        reason = f"{place} is not writable"
    if reason:
        raise click.BadParameter(f"{str(path)!r} cannot be written: {reason}", param_hint=option)


def live_terminal() -> bool:
    """Whether standard error is a terminal on which lines can be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class NamedPath(click.Path):
    """A path that somebody named: '' is an unset variable of a script, and not the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a usage error if it is empty."""
        if value == "":
            self.fail("'' is no path; '.' is the working directory.", param, ctx)
        return super().convert(value, param, ctx)


def colours_wanted() -> bool:
    """Whether standard output is a terminal that wants colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


@contextlib.contextmanager
def progress_line(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with one line per finished step.

    On a terminal the lines scroll above a live count; elsewhere they are plain lines: on standard error.
    """
    if not live_terminal():
        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, markup=False)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def step(line: str) -> None:
            console.print(printable(line))
            bar.advance(task)

        yield step
