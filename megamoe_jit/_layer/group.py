"""What the ranks of a group must agree on before a kernel of one may wait for another.

Everything here is a host collective on the caller's process group, and raises on every rank or on none: a rank that
fails alone would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megamoe_jit._errors import ConfigError, MegaMoeError, PeerTimeoutError, RankMismatchError
from megamoe_jit._text import first_line

T = TypeVar("T")


def group_size(group: Any) -> int:
    """Ranks of a process group; 1 for None.  Raises `ConfigError` if it is neither."""
    if group is None:
        return 1
    try:
        return int(group.size())
    except (AttributeError, TypeError, ValueError, RuntimeError):  # what is no group may have a `size` of its own
        given = type(group).__name__
        raise ConfigError(f"group: {given} given; allowed: None, or a process group of torch.distributed") from None


def group_rank(group: Any) -> int:
    """This process's rank in a process group; 0 for None."""
    return 0 if group is None else int(group.rank())


def gather(group: Any, value: T) -> list[T]:
    """Every rank's value, by rank.

    Raises:
        PeerTimeoutError: the process group gave up: a rank did not come, or is gone.
    """
    if group_size(group) == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * group_size(group)
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        said = first_line(error)
        raise PeerTimeoutError(f"rank {group_rank(group)}: the ranks did not all meet on the host: {said}") from error
    return values


def by_rank(values: Iterable[object]) -> str:
    """Values of all ranks, for a message."""
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))


def require_equal(group: Any, what: str, fields: Mapping[str, object]) -> None:
    """Raise `RankMismatchError` on every rank, naming ranks and field, unless all ranks have equal fields."""
    everyone: Sequence[dict[str, object]] = gather(group, dict(fields))
    problems = []
    for name in fields:
        values = [each.get(name) for each in everyone]
        if any(value != values[0] for value in values):
            problems.append(f"{name} ({by_rank(values)})")
    if problems:
        raise RankMismatchError(f"ranks disagree on {what}: {'; '.join(problems)}")


def collectively(group: Any, what: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it fails on any, raise on all of them.

    The rank that failed raises its own error, the others a `MegaMoeError` that names it.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        if group_size(group) == 1:
            raise
        error = caught
    try:
        failures = gather(group, None if error is None else f"{type(error).__name__}: {error}")
    except MegaMoeError as absent:
        if error is not None:
            raise error from absent  # the cause; that the others did not come follows from it
        raise
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise MegaMoeError(f"{what} failed on rank {rank}: {failure}")
    return result  # type: ignore[return-value]
