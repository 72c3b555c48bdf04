"""The error of a call that a rank was lost in, which names who is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megamoe_jit._errors import PeerTimeoutError
from megamoe_jit._nodes.watch import UNASKED

if TYPE_CHECKING:
    from megamoe_jit._nodes.ranks import NodeRanks

__all__ = ["loss"]


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
