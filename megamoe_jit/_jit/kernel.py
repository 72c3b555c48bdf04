"""`CompiledKernel`: a binary ready to be loaded, and the command line that makes it ahead of time."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Literal

from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec.compilable import Compilable

Origin = Literal["memory", "pack", "disk", "compiled"]  #: pack: a read-only cache


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel ready to be loaded.

    Attributes:
        spec: what it was compiled for.
        key: its name in the cache.
        cubin: the binary.
        meta: what the cache entry says, or would say.
        origin: where this call found it.
        seconds: how long this call took to get it.
    """

    spec: Compilable
    key: str
    cubin: bytes = dataclasses.field(repr=False)
    meta: Metadata = dataclasses.field(repr=False, compare=False)
    origin: Origin
    seconds: float


def warmup_command(spec: Compilable) -> str:
    """The command line that compiles exactly this kernel ahead of time, into the cache of this process."""
    settings = get_settings()
    there = f" --cache-dir {shlex.quote(str(settings.cache_dir))}" if settings.source("cache_dir") == "argument" else ""
    return f"megamoe-jit {spec.command}{there}"
