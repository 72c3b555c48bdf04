"""`ForAnyLayer`: what specs of kernels have in common that serve every layer, since all sizes are run-time values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, Self, TypeVar

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown

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
        if not isinstance(data, dict) or set(data) != {cls.word} or data[cls.word] not in values:
            raise ConfigError(f"data = {shown(data)} is not supported; allowed: a table with {cls.word}, {values}")
        return cls(cls.kinds(data[cls.word]))
