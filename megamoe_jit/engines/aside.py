"""Stepping aside: one warning for each plug-in and process, and an engine that runs as without it."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from megamoe_jit._fork import renew_after_fork

__all__ = ["LOG", "guarded", "step_aside", "warn_once"]

LOG = logging.getLogger("megamoe_jit")
_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_warned: set[str] = set()


def warn_once(about: str, message: str) -> None:
    """Log a warning, unless one about this was logged in this process before."""
    with _lock:
        if about in _warned:
            return
        _warned.add(about)
    LOG.warning(message)


def step_aside(engine: str, reasons: list[str]) -> None:
    """Say once why an engine runs without the plug-in."""
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    warn_once(
        f"{engine}: plug-in",
        f"megamoe-jit does not fit the {engine} that is installed and leaves it as it is: {shown}. "
        f"`megamoe-jit doctor --engine {engine}` says which releases it was run with",
    )


def guarded(engine: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """For what an entry point calls: whatever goes wrong in it is a warning, never an exception of the engine."""

    def wrap(register: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(register)
        def call() -> None:
            try:
                register()
            except Exception as error:  # an engine must start all the same
                step_aside(engine, [f"{type(error).__name__}: {error}"])

        return call

    return wrap
