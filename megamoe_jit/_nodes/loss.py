"""A rank that is lost: noticing it while the device works, and saying which one it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megamoe_jit._errors import PeerTimeoutError

if TYPE_CHECKING:
    from megamoe_jit._nodes.ranks import NodeRanks

__all__ = ["UNASKED", "RailLost", "Watch", "loss", "wait_until"]


UNASKED: dict[int, str] = {}  #: stands for what nobody has found out yet
SPIN_S, NAP_S = 0.01, 1e-4  #: a wait that is over soon costs no wake-up; a long one leaves the core to others


class RailLost(RuntimeError):
    """What a wait on the host has noticed; as NCCL's own errors it becomes a `loss`, once.

    Attributes:
        missing: as `RollCall.missing` gave it, if that was asked.
    """

    def __init__(self, said: str, missing: dict[int, str] | None) -> None:
        super().__init__(said)
        self.missing = missing


def loss(topology: NodeRanks, said: str, missing: dict[int, str] | None = UNASKED) -> PeerTimeoutError:
    """The error of a call that did not get through, which names who is missing.

    Args:
        topology: whose ranks are called, which takes a few seconds.
        said: what was noticed.
        missing: as `RollCall.missing` gave it, where that was asked already.
    """
    topology.roll_call.give_notice()
    if missing is UNASKED:
        missing = topology.roll_call.missing()
    if missing is None:
        who = "nobody can be asked: the store of the process group is gone, and with it the process that kept it"
    elif missing:
        who = "missing: " + ", ".join(f"{topology.place_of(rank)}: {why}" for rank, why in missing.items())
    else:
        who = "every rank is there: look at the network between the nodes"
    here = topology.place_of(topology.rank)
    return PeerTimeoutError(
        f"{here}: in call {topology.roll_call.calls} between nodes, {said} ({who}). "
        "This buffer is unusable, restart the processes"
    )


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
        self.missing: dict[int, str] | None = UNASKED  #: who is, once that was asked

    def __call__(self) -> str | None:
        """What was noticed, None while all is well."""
        said = self._error()
        if said is not None:
            return f"NCCL reports {said}"
        if time.monotonic() < self._deadline:
            return None
        found = self._missing()
        if found == {}:
            self._deadline = time.monotonic() + self._timeout_s
            return None
        self.missing = found
        return f"nothing came for {self._timeout_s:g} s"


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
