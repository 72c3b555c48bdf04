"""`Spec`: what all kinds of kernels have in common, so that one cache, one compiler and one loader serve them."""

from __future__ import annotations

from typing import Any, Protocol

from megamoe_jit._spec.spec import KernelSpec
from megamoe_jit._spec.stage import StageSpec

__all__ = ["Spec", "spec_from_json", "spec_of_entry"]


class Spec(Protocol):
    """Something that is rendered, compiled, cached and loaded; a frozen value."""

    @property
    def entry(self) -> str:
        """Symbol of the kernel."""

    @property
    def template(self) -> str:
        """Path of the Jinja2 entry under `kernels_src/`."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""

    @property
    def timeline(self) -> bool:
        """Whether the kernel writes down where its time goes."""

    def template_variables(self) -> dict[str, Any]:
        """What the Jinja2 entry is filled with."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, of which `spec_from_json` makes it again."""

    def warmup_options(self) -> str:
        """Options of `megamoe-jit warmup` that compile this kernel; empty if it compiles none like it."""

    def __hash__(self) -> int: ...


def spec_from_json(data: dict[str, Any]) -> KernelSpec | StageSpec:
    """The specification whose `to_json` gave this; raises `ConfigError` for what is no such data."""
    if isinstance(data, dict) and "stage" in data:
        return StageSpec.from_json(data)
    return KernelSpec.from_json(data)


def spec_of_entry(entry: str) -> KernelSpec | StageSpec | None:
    """The kernel with this symbol; None if it is none's.  Raises `ConfigError` if a part is not supported."""
    return StageSpec.of_entry(entry) or KernelSpec.of_entry(entry)
