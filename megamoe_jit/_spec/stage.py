"""`StageSpec`: the kernel that stages inputs in a launch of its own, one for each format of activations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown

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
    def kernel_name(self) -> str:
        """Symbol of the kernel."""
        return f"megamoe_stage_{self.format.value}"

    @classmethod
    def of_kernel_name(cls, name: str) -> StageSpec | None:
        """The kernel with this symbol; None if it is none's."""
        return next((spec for spec in map(cls, StageFormat) if spec.kernel_name == name), None)

    @property
    def template(self) -> str:
        """Path of the Jinja2 template under `kernels_src/`."""
        return "kernels/stage.cuh.j2"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 0

    @property
    def timeline(self) -> bool:
        """It keeps no records of its time."""
        return False

    @property
    def command(self) -> str:
        """Words of the command line that compile it alone; `warmup` does so with the kernels of any shape."""
        return f"inspect {self.kernel_name}"

    @property
    def remark(self) -> str:
        """What to say beside `command`: nothing."""
        return ""

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 template is filled with."""
        return {"kernel_name": self.kernel_name, "format": self.format.struct}

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {"stage": self.format.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StageSpec:
        """Inverse of `to_json`; raises `ConfigError` for what is no such data."""
        formats = [form.value for form in StageFormat]
        if not isinstance(data, dict) or set(data) != {"stage"} or data["stage"] not in formats:
            raise ConfigError(f"data = {shown(data)} is not supported; allowed: a table with stage, {formats}")
        return cls(StageFormat(data["stage"]))
