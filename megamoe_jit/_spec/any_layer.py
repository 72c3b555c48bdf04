"""`StageSpec` and `PassSpec`: kernels that serve every layer, since all sizes are run-time values, strides too.

Those that stage inputs in a launch of their own, one for each format of activations, and those of one pass over rows
that travel between nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, Self, TypeVar

from megamoe_jit._spec.checks import check

_Kind = TypeVar("_Kind", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class ForAnyLayer(Generic[_Kind]):
    """A spec that is a member of an enumeration.

    Attributes:
        kind: the member.
        word: of its kernels' names, and the key of its data.
        kinds: the enumeration.
    """

    kind: _Kind
    word: ClassVar[str]
    kinds: ClassVar[type[Any]]

    @property
    def kernel_name(self) -> str:
        """Symbol of the kernel."""
        return f"megamoe_{self.word}_{self.kind.value}"

    @classmethod
    def of_kernel_name(cls, name: str) -> Self | None:
        """The kernel with this symbol; None if it is none's."""
        return next((spec for spec in (cls(kind) for kind in cls.kinds) if spec.kernel_name == name), None)

    @property
    def template(self) -> str:
        """Path of the Jinja2 template under `kernels_src/`."""
        return f"kernels/{self.word}.cuh.j2"

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

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {self.word: self.kind.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_json`; raises `ConfigError` for what is no such data."""
        values = [kind.value for kind in cls.kinds]
        fits = isinstance(data, dict) and set(data) == {cls.word} and data[cls.word] in values
        check(fits, "data", data, f"a table with {cls.word}, {values}")
        return cls(cls.kinds(data[cls.word]))


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
    """One staging kernel."""

    __slots__ = ()
    word = "stage"
    kinds = StageFormat

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 template is filled with."""
        return {"kernel_name": self.kernel_name, "format": self.kind.struct}


class Pass(StrEnum):
    """What a pass over rows does."""

    ROUTE = "route"
    PACK = "pack"
    UNPACK = "unpack"
    SUM_BF16 = "sum_bf16"
    SUM_FP32 = "sum_fp32"

    @property
    def function(self) -> str:
        """Its name in `kernels_src/kernels/nodes.cuh`."""
        sums = {Pass.SUM_BF16: "sum_nodes<false>", Pass.SUM_FP32: "sum_nodes<true>"}
        return sums.get(self) or f"{self.value}_rows"


class PassSpec(ForAnyLayer[Pass]):
    """The kernel of one pass."""

    __slots__ = ()
    word = "nodes"
    kinds = Pass

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 template is filled with."""
        return {"kernel_name": self.kernel_name, "function": self.kind.function}
