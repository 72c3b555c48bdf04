"""A rank that is lost: noticing it while the device works, and saying which one it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from megamoe_jit._errors import PeerTimeoutError

if TYPE_CHECKING:
    from megamoe_jit._nodes.choice import Choices
    from megamoe_jit._nodes.ranks import NodeRanks

__all__ = ["UNASKED", "Watch", "loss"]


UNASKED: dict[int, str] = {}  #: stands for what nobody has found out yet


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
        topology: whose ranks are called when it takes long.
        choices: whose rail is asked.
        device: that works.
        timeout_s: after which the ranks are called; a device that is only busy goes on.
    """

    def __init__(self, topology: NodeRanks, choices: Choices, device: torch.device, timeout_s: float) -> None:
        self._topology, self._choices, self._device, self._timeout_s = topology, choices, device, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self.missing: dict[int, str] | None = UNASKED  #: who is, once that was asked

    def __call__(self) -> str | None:
        """What was noticed, None while all is well."""
        said = self._choices.error(self._device)
        if said is not None:
            return f"NCCL reports {said}"
        if time.monotonic() < self._deadline:
            return None
        found = self._topology.roll_call.missing()
        if found == {}:
            self._deadline = time.monotonic() + self._timeout_s
            return None
        self.missing = found
        return f"nothing came for {self._timeout_s:g} s"
