"""What a kernel is compiled for: the shape, the variant, and the shared memory that follows from them.

A kernel is specialised per (hidden, intermediate, experts, top-k, variant, ranks, numeric options).  Token count,
capacity, SM count, timeout and clamp are run-time values, so one compiled kernel serves every batch.
"""

from __future__ import annotations

import ctypes
import math
import numbers
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown

__all__ = [
    "MAX_EXPERTS",
    "MAX_RANKS",
    "MAX_SIZE",
    "MAX_TOKENS",
    "MAX_TOPK",
    "Inputs",
    "KernelSpec",
    "MoEShape",
    "Spec",
    "Variant",
    "check_clamp",
    "check_flag",
    "check_int",
]

MAX_TOPK = 32
MAX_SIZE = 262144  #: of hidden and intermediate; kernels for larger ones spill
MAX_EXPERTS = 1024
MAX_RANKS = 8
MAX_TOKENS = 32768
BLOCK = 128  #: quantisation block, in both directions
BLOCK_N = 256  #: columns of a tile: in the first GEMM these are 128 gate and 128 up columns
SHARED_LIMIT = 232448  #: dynamic shared memory a block may use on SM90, bytes
STAGING_BYTES = 8 * 2048  #: 16 rows x 128 B for each of the eight math warps
TILE_SLOTS = 4  #: depth of the ring in which the scheduler publishes tiles
DISPATCH_CHUNK = 2048  #: bytes that dispatch moves at a time through a slot of its own
MIN_DISPATCH_SLOTS, MAX_DISPATCH_SLOTS = 2, 8


class Variant(StrEnum):
    """How the two math warpgroups of a block share the work."""

    PINGPONG = "pingpong"  #: BLOCK_M 64: each owns a whole tile, half a cycle out of phase
    COOPERATIVE = "cooperative"  #: BLOCK_M 128: both split the rows of one tile and share its weights

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return 64 if self is Variant.PINGPONG else 128

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant named `text`; raises `ConfigError` with the names there are."""
        for variant in cls:
            if isinstance(text, str) and text == variant.value:
                return variant
        raise ConfigError(f"unknown kernel variant {shown(text)}; allowed: {', '.join(v.value for v in cls)}")


class Inputs(StrEnum):
    """Where the inputs of a launch come from."""

    STAGED = "staged"  #: from the buffer, staged by earlier work of the stream
    RAW = "raw"  #: from tensors of the caller, bf16; the launch stages them itself

    @classmethod
    def parse(cls, text: str) -> Inputs:
        """The one named `text`; raises `ConfigError` with the names there are."""
        for inputs in cls:
            if isinstance(text, str) and text == inputs.value:
                return inputs
        raise ConfigError(f"unknown inputs {shown(text)}; allowed: {', '.join(i.value for i in cls)}")


def _check(ok: bool, what: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{what} = {shown(value)} is not supported; allowed: {allowed}")


def _fields(what: str, data: dict[str, Any], needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The data, if they are a table with these fields and no others."""
    _check(isinstance(data, dict), what, data, f"a table with {', '.join(needed)}")
    for name in needed:
        _check(name in data, what, data, f"a table with {', '.join(needed)}; it has no {name}")
    for name in data:
        _check(name in needed + optional, what, data, f"a table with {', '.join(needed)}; not {shown(name)}")
    return data


def check_int(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is an integer, which a bool is not."""
    _check(type(value) is int, what, value, "an integer")


def check_flag(what: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    _check(type(value) is bool, what, value, "True or False")


def check_clamp(name: str, clamp: float | None) -> float:
    """Raise unless this is a bound or None; as the kernel takes it (infinity for none)."""
    if clamp is None:
        return math.inf
    bound = -1.0
    if type(clamp) is float or (isinstance(clamp, numbers.Real) and not isinstance(clamp, bool)):  # floats at once
        try:
            bound = ctypes.c_float(float(clamp)).value  # as the kernel has it
        except OverflowError:  # an integer that no float holds
            bound = math.inf
    if not bound >= 0 or (bound == math.inf and clamp != math.inf):
        allowed = "0 or a positive number that float32 holds, or None"
        raise ConfigError(f"{name} = {shown(clamp)} is not supported; allowed: {allowed}")
    return bound


@dataclass(frozen=True, slots=True)
class MoEShape:
    """Sizes of one MoE layer.

    Attributes:
        hidden: columns of a token, a multiple of 128 up to 262144.
        intermediate: columns between the two products, likewise.
        experts: of all ranks, 1 to 1024.
        topk: slots of a token, 1 to 32.

    Raises:
        ConfigError: a size is not supported.
    """

    hidden: int
    intermediate: int
    experts: int
    topk: int

    def __post_init__(self) -> None:
        check_int("hidden", self.hidden)
        check_int("intermediate", self.intermediate)
        check_int("experts", self.experts)
        check_int("topk", self.topk)
        for name, size in (("hidden", self.hidden), ("intermediate", self.intermediate)):
            fits = 0 < size <= MAX_SIZE and size % BLOCK == 0
            _check(fits, name, size, f"a multiple of 128 from 128 to {MAX_SIZE}")
        _check(1 <= self.experts <= MAX_EXPERTS, "experts", self.experts, f"1 to {MAX_EXPERTS}")
        _check(1 <= self.topk <= MAX_TOPK, "topk", self.topk, f"1 to {MAX_TOPK}")


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

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 entry is filled with."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` of its class makes it again."""

    def warmup_options(self) -> str:
        """Options of `megamoe-jit warmup` that compile this kernel; empty if it compiles none like it."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel to compile; everything in here is a compile-time constant of it.

    Attributes:
        shape: the layer.
        variant: how the warpgroups share the work.
        ranks: GPUs that share the experts, 1 to 8; a divisor of their number.
        fast_math: approximate exponential and reciprocal in SwiGLU.
        timeline: the kernel writes down where its time goes; for measuring the kernel alone.
        inputs: where a launch has its inputs from.

    Raises:
        ConfigError: a value is not supported.
    """

    shape: MoEShape
    variant: Variant
    ranks: int = 1
    fast_math: bool = True
    timeline: bool = False  #: the kernel writes down where its time goes
    inputs: Inputs = Inputs.STAGED

    def __post_init__(self) -> None:
        _check(isinstance(self.shape, MoEShape), "shape", self.shape, "a MoEShape")
        _check(isinstance(self.variant, Variant), "variant", self.variant, "a member of Variant")
        check_flag("fast_math", self.fast_math)
        check_flag("timeline", self.timeline)
        _check(isinstance(self.inputs, Inputs), "inputs", self.inputs, "a member of Inputs")
        check_int("ranks", self.ranks)
        _check(1 <= self.ranks <= MAX_RANKS, "ranks", self.ranks, f"1 to {MAX_RANKS}")
        _check(
            self.shape.experts % self.ranks == 0,
            "experts",
            self.shape.experts,
            f"a multiple of the number of ranks ({self.ranks})",
        )

    @property
    def local_experts(self) -> int:
        """Experts whose weights live on one rank."""
        return self.shape.experts // self.ranks

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self.variant.block_m

    @property
    def stage_bytes(self) -> int:
        """One pipeline stage: activations, weights, a float scale per activation row and four for the weights."""
        return self.block_m * BLOCK + BLOCK_N * BLOCK + self.block_m * 4 + 16

    @property
    def fixed_shared_bytes(self) -> int:
        """Shared memory beside pipeline stages and dispatch slots (the same sum as `layout/shared.cuh`)."""
        slots = TILE_SLOTS * (3 * 8 + 32)
        plan = 4 * self.local_experts + 2 * 4 * (self.local_experts + 1) + 2 * self.local_experts
        return STAGING_BYTES + slots + 64 + plan

    @property
    def source_table_bytes(self) -> int:
        """With several ranks: which part of each rank's pairs names each local expert."""
        return 8 * self.shape.experts if self.ranks > 1 else 0

    @property
    def _ring_room(self) -> int:
        return SHARED_LIMIT - self.fixed_shared_bytes - self.source_table_bytes - 16

    @property
    def stages(self) -> int:
        """Pipeline stages that fit, at most five."""
        return min(5, (self._ring_room - MIN_DISPATCH_SLOTS * (DISPATCH_CHUNK + 8)) // (self.stage_bytes + 16))

    @property
    def dispatch_slots(self) -> int:
        """Chunks of rows that dispatch keeps in flight: as many as still fit, two to eight."""
        return min(
            MAX_DISPATCH_SLOTS, (self._ring_room - self.stages * (self.stage_bytes + 16)) // (DISPATCH_CHUNK + 8)
        )

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        rings = self.stages * (self.stage_bytes + 16) + self.dispatch_slots * (DISPATCH_CHUNK + 8)
        return -(-(rings + self.fixed_shared_bytes) // 16) * 16 + self.source_table_bytes

    @property
    def entry(self) -> str:
        """Symbol of the kernel."""
        s = self.shape
        math = "fast" if self.fast_math else "exact"
        sizes = f"h{s.hidden}_i{s.intermediate}_e{s.experts}_k{s.topk}_r{self.ranks}"
        return f"megamoe_{self.variant.value}_{sizes}_{math}{'_timeline' if self.timeline else ''}{self._inputs_suffix}"

    @property
    def _inputs_suffix(self) -> str:
        return "" if self.inputs is Inputs.STAGED else f"_{self.inputs.value}"

    @property
    def template(self) -> str:
        """Path of the Jinja2 entry under `kernels_src/`."""
        return f"kernels/{self.variant.value}.cuh.j2"

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 entry is filled with."""
        return {
            "entry": self.entry,
            "hidden": self.shape.hidden,
            "intermediate": self.shape.intermediate,
            "experts": self.shape.experts,
            "topk": self.shape.topk,
            "ranks": self.ranks,
            "stages": self.stages,
            "dispatch_slots": self.dispatch_slots,
            "shared_bytes": self.shared_bytes,
            "fast_math": "true" if self.fast_math else "false",
            "timeline": "true" if self.timeline else "false",
            "inputs": self.inputs.value,
        }

    def warmup_options(self) -> str:
        """Options of `megamoe-jit warmup` that compile this kernel, and those that stage for it; empty if none do."""
        s = self.shape
        sizes = f"--hidden {s.hidden} --intermediate {s.intermediate} --experts {s.experts} --topk {s.topk}"
        math = "" if self.fast_math else " --no-fast-math"
        options = f"{sizes} --ranks {self.ranks} --variant {self.variant.value}{math} --inputs {self.inputs.value}"
        return "" if self.timeline else options

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {**asdict(self), "variant": self.variant.value, "inputs": self.inputs.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelSpec:
        """Inverse of `to_json`; raises `ConfigError` for what is no such data."""
        sizes = _fields("data", data, ("shape", "variant", "ranks", "fast_math"), ("timeline", "inputs"))["shape"]
        return cls(
            shape=MoEShape(**_fields("shape", sizes, ("hidden", "intermediate", "experts", "topk"))),
            variant=Variant.parse(data["variant"]),
            ranks=data["ranks"],
            fast_math=data["fast_math"],
            timeline=data.get("timeline", False),
            inputs=Inputs.parse(data.get("inputs", Inputs.STAGED.value)),
        )
