"""What a plug-in says in an engine's log, once each: what it serves, or why it steps aside."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from megamoe_jit._errors import ConfigError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._spec import MoEShape, WeightFormat
from megamoe_jit._spec.spec import warmup_words

LOG = logging.getLogger("megamoe_jit")
_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_warned: set[str] = set()  #: and told


def warn_once(about: str, message: str) -> None:
    """Log a warning, unless one about this was logged in this process before."""
    if _is_new(about):
        LOG.warning(message)


def tell_served(shape: MoEShape, ranks: int, weights: WeightFormat, tokens: int) -> None:
    """Log once in this process, from info on, that layers of these sizes run here, and what would warm them up."""
    command = f"megamoe-jit {warmup_words(shape, ranks, weights)}"
    if _is_new(f"serves: {command}"):
        LOG.info("serves layers of this engine, up to %d tokens in a launch; ahead of time: %s", tokens, command)


def no_shape(hidden: int, intermediate: int, experts: int, topk: int) -> str:
    """Why there is no kernel for experts of these sizes, those of a rank; empty if there is one."""
    try:
        MoEShape(hidden, intermediate, experts, topk)
    except ConfigError as error:
        return f"sizes of a rank: {error}"
    return ""


def _is_new(about: str) -> bool:
    """Whether nothing about this was logged in this process before."""
    with _lock:
        known = about in _warned
        _warned.add(about)
        return not known


def step_aside(engine: str, reasons: list[str]) -> None:
    """Say once why an engine runs without the plug-in."""
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    warn_once(
        f"{engine}: plug-in",
        f"megamoe-jit does not fit the {engine} that is installed and leaves it as it is: {shown}. "
        f"`megamoe-jit doctor --engine {engine}` says which releases it was run with",
    )


@contextlib.contextmanager
def guarded(engine: str) -> Iterator[None]:
    """Decorates what an entry point calls: whatever goes wrong in it is a warning, never an exception of the engine."""
    try:
        yield
    except Exception as error:  # an engine must start all the same
        step_aside(engine, [f"{type(error).__name__}: {error}"])
