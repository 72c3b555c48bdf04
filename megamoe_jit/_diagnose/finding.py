"""What a diagnosis says: a check of each thing that was looked at, with the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megamoe_jit._documents import Document


class Status(StrEnum):
    """What a check found, from good to bad."""

    OK = "ok"
    WARN = "warn"  #: works, but not everything or not well
    FAIL = "fail"  #: kernels cannot be compiled or run here


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at
        status: what came of it
        detail: what was found
        next_step: what to do
        data: the facts behind it
    """

    name: str
    status: Status
    detail: str
    next_step: str | None
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Diagnosis(Document):
    """What was checked, and what to do."""

    KIND = "doctor"

    status: Status
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, checks: Sequence[Check]) -> Diagnosis:
        """The document of some checks."""
        return cls(worst(checks), tuple(checks))


def worst(checks: Sequence[Check]) -> Status:
    """The worst status of all."""
    order = list(Status)
    return max((check.status for check in checks), key=order.index, default=Status.OK)
