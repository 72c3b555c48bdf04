"""Noticing while the device works that a rank is lost: what is asked again and again, and a wait that asks it."""

from __future__ import annotations

import time
from collections.abc import Callable

UNASKED: dict[int, str] = {}  #: stands for what nobody has found out yet
SPIN_S, NAP_S = 0.01, 1e-4  #: a wait that is over soon costs no wake-up; a long one leaves the core to others


class RailLost(RuntimeError):
    """What a wait on the host has noticed; as NCCL's own errors it becomes the error of the call, once.

    Attributes:
        missing: as `RollCall.missing` gave it, if that was asked.
    """

    def __init__(self, said: str, missing: dict[int, str] | None) -> None:
        super().__init__(said)
        self.missing = missing


class Watch:
    """What is asked again and again while the device works: whether the rail is lost.

    Args:
        missing: `RollCall.missing`, asked when it takes long; a device that is only busy goes on.
        error: what the rail has noticed itself, None while it has nothing to say.
        timeout_s: after which the ranks are called.
    """

    def __init__(
        self, missing: Callable[[], dict[int, str] | None], error: Callable[[], str | None], timeout_s: float
    ) -> None:
        self._missing, self._error, self._timeout_s = missing, error, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self.said: str | None = None  #: what was noticed, None while all is well
        self.missing: dict[int, str] | None = UNASKED  #: who is, once that was asked

    def __call__(self) -> str | None:
        """Ask again; what `said` is then."""
        noticed = self._error()
        if noticed is not None:
            self.said = f"NCCL reports {noticed}"
        elif time.monotonic() >= self._deadline:
            found = self._missing()
            if found == {}:
                self._deadline = time.monotonic() + self._timeout_s
            else:
                self.said, self.missing = f"nothing came for {self._timeout_s:g} s", found
        return self.said


def wait_until(over: Callable[[], bool], watch: Watch) -> None:
    """Return as soon as `over` says so.

    Raises:
        RailLost: the watch has noticed something before.
    """
    spun = time.monotonic() + SPIN_S
    while not over():
        if time.monotonic() < spun:
            continue
        said = watch()
        if said is not None:
            raise RailLost(said, watch.missing)
        time.sleep(NAP_S)
