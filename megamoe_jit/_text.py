"""Text for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["first_line", "human_bytes", "items_of", "shown"]


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def items_of(value: object) -> list[Any] | None:
    """What is in a value that may hold several; None for text, and for what cannot be gone through."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return None
    try:
        return list(value)
    except (TypeError, RuntimeError):  # a tensor without dimensions, or a sparse one
        return None


def shown(value: object) -> str:
    """A value as it would be written, cut short, for messages; whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        return f"{value!r:.80}"
    except Exception:  # an object that cannot be written: not every repr works
        return f"a {type(value).__name__}"


def human_bytes(count: int) -> str:
    """`count` bytes in a unit a reader can compare: 932 B, 41.6 KiB, 1.2 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
