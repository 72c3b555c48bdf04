"""Whether the work of a worker thread is still wanted: Ctrl-C reaches the main thread alone.

A thread that waits for something asks `check` now and then; whoever started it holds the event.
"""

from __future__ import annotations

import threading

__all__ = ["check", "obey"]

_local = threading.local()


def obey(stop: threading.Event) -> None:
    """From now on `check` ends the work of this thread once this event is set."""
    _local.stop = stop


def check() -> None:
    """Raise `KeyboardInterrupt` if this thread is to end; never in a thread that obeys nobody."""
    stop: threading.Event | None = getattr(_local, "stop", None)
    if stop is not None and stop.is_set():
        raise KeyboardInterrupt
