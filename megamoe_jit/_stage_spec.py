"""`StageSpec`: the kernel that stages inputs in a launch of its own, one for each format of activations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["StageFormat", "StageSpec"]


class StageFormat(StrEnum):
    """Numbers that activations come in."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    E4M3 = "e4m3"  #: codes that come with their scales

    @property
    def struct(self) -> str:
        """Its name in `kernels_src/stage/quantise.cuh`."""
        return self.value.capitalize()


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One staging kernel; sizes and strides are run-time values, so it serves every layer."""

    format: StageFormat

    @property
    def entry(self) -> str:
        """Symbol of the kernel."""
        return f"megamoe_stage_{self.format.value}"

    @property
    def template(self) -> str:
        """Path of the Jinja2 entry under `kernels_src/`."""
        return "kernels/stage.cuh.j2"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 0

    @property
    def timeline(self) -> bool:
        """It keeps no records of its time."""
        return False

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 entry is filled with."""
        return {"entry": self.entry, "format": self.format.struct}

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {"stage": self.format.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StageSpec:
        """Inverse of `to_json`."""
        return cls(StageFormat(data["stage"]))
