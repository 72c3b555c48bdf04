"""Text for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text with whatever could steer a terminal, or not be written to one, as escapes: `\x1b`, `\u202e`, `\udcff`.

    Names from packs, files and the environment may hold anything; what no terminal draws is spelled out.

    Args:
        text: to be shown.
        keep: characters that stay although they are not printable.
    """
    if text.isprintable() or (keep and text.translate(dict.fromkeys(map(ord, keep))).isprintable()):
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode("ascii") for char in text
    )


def one_line(text: str) -> str:
    """The text as a part of one line: `printable`, line ends and tabs too."""
    return printable(text, keep="")


def shown(value: object, most: int = 80) -> str:
    """A value somebody wrote, for a message: its `repr`, cut short, in one line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # too many lists in each other; an object that cannot be written: not every repr works
        text = f"a {type(value).__name__} too long to show"
    return one_line(text if len(text) <= most else f"{text[: most - 3]}...")


def several(items: Iterable[str], most: int = 20) -> str:
    """Items separated by commas; how many there are beyond the first ones."""
    names = [one_line(item) for item in items]
    return ", ".join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def counted(count: int, what: str) -> str:
    """`1 kernel`, `2 kernels`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def first_line(error: BaseException, most: int = 1000) -> str:
    """What an error says, in a line that is cut short; its type if it says nothing."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def items_of(value: object) -> list[Any] | None:
    """What is in a value that may hold several; None for text, and for what cannot be gone through."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return None
    try:
        return list(value)
    except (TypeError, RuntimeError):  # a tensor without dimensions, or a sparse one
        return None


def human_bytes(count: int) -> str:
    """`count` bytes in a unit a reader can compare: 932 B, 41.6 KiB, 1.2 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
