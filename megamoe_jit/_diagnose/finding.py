"""What a diagnosis says: one finding per thing that was looked at, with the next step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["Check", "Status", "worst"]


class Status(StrEnum):
    """What a check found, from good to bad."""

    OK = "ok"
    WARN = "warn"  #: works, but not everything or not well
    FAIL = "fail"  #: kernels cannot be compiled or run here


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at.
        status: what came of it.
        detail: what was found.
        next_step: what to do, empty if nothing.
        data: the facts behind it.
    """

    name: str
    status: Status
    detail: str
    next_step: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "status": self.status.value, "next_step": self.next_step or None}


def worst(checks: list[Check]) -> Status:
    """The worst status of all."""
    order = list(Status)
    return max((check.status for check in checks), key=order.index, default=Status.OK)
