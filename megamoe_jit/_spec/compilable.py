"""`Compilable`: what a room that renders, compiles, keeps or loads a kernel may ask of its spec."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol


class Compilable(Hashable, Protocol):
    """A kernel of any kind, as a value that can be hashed and compared; `KernelSpec` is one."""

    @property
    def kernel_name(self) -> str:
        """Symbol of the kernel."""

    @property
    def template(self) -> str:
        """Path of the Jinja2 template under `kernels_src/`."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""

    @property
    def command(self) -> str:
        """Words of the command line, after its name, that compile exactly this kernel."""

    @property
    def remark(self) -> str:
        """What to say beside `command` where the kernel is missed; empty for nothing."""

    def template_variables(self) -> dict[str, Any]:
        """What the Jinja2 template is filled with."""

    def to_json(self) -> dict[str, Any]:
        """Plain data that name it."""
