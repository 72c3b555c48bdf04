"""Which entries of a full cache go: the least recently used, those nobody here would use again before the others."""

from __future__ import annotations

import time
from collections.abc import Iterable

from megamoe_jit._cache.entry import EntryInfo

GRACE_S = 600.0  #: what was made or used within this time is kept, whatever the size
LOW_WATER = 0.9  #: an eviction comes down to this part of the limit, so that not every publish evicts


def to_remove(
    entries: Iterable[EntryInfo],
    *,
    max_bytes: int | None = None,
    older_than_s: float | None = None,
    current: tuple[str, str] | None = None,
    now: float | None = None,
    grace_s: float = GRACE_S,
) -> list[EntryInfo]:
    """Choose what to remove.

    Args:
        entries: everything there is.
        max_bytes: size to come down to.
        older_than_s: take everything that was not used for this long.
        current: package version and compiler build whose entries go last when the size asks for it.
        now: the time, in seconds since 1970.
        grace_s: what was used within this time stays.

    Returns:
        The entries to remove, in order.
    """
    now = time.time() if now is None else now
    every = list(entries)
    total = sum(info.disk_bytes for info in every)
    idle = [info for info in every if now - info.used_at >= grace_s]

    def is_current(info: EntryInfo) -> bool:
        build = info.meta.get("nvrtc", {}).get("build")
        return current is not None and (info.meta.get("package_version"), build) == current

    doomed = []
    for info in sorted(idle, key=lambda i: (is_current(i), i.used_at, i.key)):
        too_old = older_than_s is not None and now - info.used_at >= older_than_s
        if too_old or (max_bytes is not None and total > max_bytes):
            doomed.append(info)
            total -= info.disk_bytes
    return doomed
