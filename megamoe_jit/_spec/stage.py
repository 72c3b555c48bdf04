"""`StageSpec`: the kernel that stages inputs in a launch of its own, one for each format of activations."""

from __future__ import annotations

from enum import StrEnum

from megamoe_jit._spec.any_layer import ForAnyLayer


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


class StageSpec(ForAnyLayer[StageFormat]):
    """One staging kernel; strides are run-time values too."""

    __slots__ = ()
    word = "stage"
    kinds = StageFormat

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 template is filled with."""
        return {"kernel_name": self.kernel_name, "format": self.kind.struct}
