"""What a kernel is compiled for: shape, variant and the rest, and the shared memory that follows from them.

A kernel is specialised per (hidden, intermediate, experts, top-k, variant, ranks, numeric options).  Token count,
capacity, SM count, timeout and clamp are run-time values, so one compiled kernel serves every batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.abi import (
    BLOCK_N,
    DISPATCH_CHUNK,
    GROUP,
    MATH_WARPS,
    MAX_RANKS,
    SHARED_LIMIT,
    STAGING_BYTES,
    THREADS,
    TILE_BYTES,
    TILE_SLOTS,
)
from megamoe_jit._spec.checks import check, check_fields, check_flag, check_int
from megamoe_jit._spec.formats import FORMATS, FP8, FP8_E5M2, ExpandedParts, WeightFormat
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._spec.shape import BLOCK, MAX_EXPERTS, MoEShape
from megamoe_jit._spec.variants import Variant

TEMPLATE = "kernels/entry.cuh.j2"
DEFAULT_NUMERICS = Numerics()
_UNSET: Any = object()  #: what `numerics` says
MIN_DISPATCH_SLOTS, MAX_DISPATCH_SLOTS = 2, 8
_NAME = re.compile(
    r"megamoe_([a-z0-9_]+?)_h(\d{1,9})_i(\d{1,9})_e(\d{1,9})_k(\d{1,9})(?:_s(\d{1,9}))?_r(\d{1,9})((?:_[a-z0-9]+)*)"
)


def warmup_words(shape: MoEShape, ranks: int, weights: WeightFormat) -> str:
    """Words of the command line that compile all kernels of a layer."""
    words = [
        f"warmup --hidden {shape.hidden} --intermediate {shape.intermediate} --experts {shape.experts}",
        f"--topk {shape.topk} --ranks {ranks}",
    ]
    if shape.shared:
        words.append(f"--shared {shape.shared}")
    if weights is not FP8:
        words.append(f"--weight-format {weights.name}")
    return " ".join(words)


@dataclass(frozen=True, init=False)
class KernelSpec:
    """One kernel to compile; everything in here is a compile-time constant of it.

    Attributes:
        shape: the layer.
        variant: how the warpgroups share the work.
        ranks: GPUs that share the experts, 1 to 8; a divisor of their number.
        numerics: its numeric options.
        timeline: the kernel writes down where its time goes; for measuring the kernel alone.
        weights: how the weights are stored.
        inputs: where a launch has its inputs from.

    `fast_math` may be given instead of `numerics`, or beside it, and can be read.  What follows from the rest is worked
    out once, at its first use.

    Raises:
        ConfigError: a value is not supported.
    """

    shape: MoEShape
    variant: Variant
    ranks: int
    numerics: Numerics
    timeline: bool
    weights: WeightFormat
    inputs: Inputs

    def __init__(
        self,
        shape: MoEShape,
        variant: Variant,
        ranks: int = 1,
        fast_math: bool = _UNSET,
        timeline: bool = False,
        *,
        numerics: Numerics = DEFAULT_NUMERICS,
        weights: WeightFormat = FP8,
        inputs: Inputs = Inputs.STAGED,
    ) -> None:
        check(isinstance(shape, MoEShape), "shape", shape, "a MoEShape")
        check(isinstance(variant, Variant), "variant", variant, "a member of Variant")
        check(isinstance(numerics, Numerics), "numerics", numerics, "a Numerics")
        check(isinstance(weights, WeightFormat), "weights", weights, "a WeightFormat")
        check(isinstance(inputs, Inputs), "inputs", inputs, "a member of Inputs")
        readers = Variant.reading(weights)
        among = f"{', '.join(readers) or 'none yet'}, for weights in {weights.name}"
        if variant not in readers:
            reads = [each.name for each in FORMATS.values() if each.what in variant.codes]
            among = f"{among}; {variant.value} takes {', '.join(reads) or 'none yet'}"
        check(variant in readers, "variant", variant.value, among)
        check_flag("timeline", timeline)
        check_int("ranks", ranks)
        check(1 <= ranks <= MAX_RANKS, "ranks", ranks, f"1 to {MAX_RANKS}")
        evenly = f"a multiple of the number of ranks ({ranks})"
        check(shape.experts % ranks == 0, "experts", shape.experts, evenly)
        most = (MAX_EXPERTS - shape.experts) // ranks
        check(shape.shared <= most, "shared", shape.shared, f"0 to {most}, for {MAX_EXPERTS} experts on {ranks} ranks")
        if fast_math is not _UNSET:
            numerics = replace(numerics, fast_math=fast_math)
        sizes = {"shape": shape, "variant": variant, "ranks": ranks}
        vars(self).update(sizes, numerics=numerics, timeline=timeline, weights=weights, inputs=inputs)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Its fields alone for another process, in which what is worked out of them, its hash above all, is another."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.variant, self.ranks, self.numerics, self.timeline, self.weights, self.inputs))

    @property
    def fast_math(self) -> bool:
        """Of the numeric options."""
        return self.numerics.fast_math

    @cached_property
    def local_experts(self) -> int:
        """Experts whose weights live on one rank, the shared ones behind the others."""
        return self.shape.experts_of(self.ranks) // self.ranks

    @cached_property
    def block_m(self) -> int:
        """Rows of a tile, at most."""
        return self.variant.block_m

    @cached_property
    def stage_bytes(self) -> int:
        """One pipeline stage: activations, weights, a float scale per activation row and four for the weights."""
        return self.block_m * BLOCK + self.weight_stage_bytes + self.block_m * 4 + 16

    @property
    def staged(self) -> WeightFormat:
        """The format of weights in the pipeline stages."""
        return FP8_E5M2 if self.variant.expands or self.variant.helpers else self.weights

    @property
    def expanded_bytes(self) -> int:
        """Memory in which it expands weights before it multiplies them; 0 if it does not."""
        if not self.variant.expands:
            return 0
        return sum(ExpandedParts.of(self.shape.hidden, self.shape.intermediate, self.local_experts))

    @property
    def threads(self) -> int:
        """Of a block."""
        return THREADS + GROUP * self.variant.helpers

    @cached_property
    def weight_stage_bytes(self) -> int:
        """Weights of a pipeline stage, with the exponents of their groups."""
        return self.staged.stream_bytes(BLOCK_N, BLOCK)

    @cached_property
    def fixed_shared_bytes(self) -> int:
        """Shared memory beside pipeline stages and dispatch slots (the same sum as `layout/shared.cuh`)."""
        slots = TILE_SLOTS * (3 * 8 + TILE_BYTES)
        plan = 4 * self.local_experts + 2 * 4 * (self.local_experts + 1) + 2 * self.local_experts
        return MATH_WARPS * STAGING_BYTES + slots + 64 + plan

    @cached_property
    def _ring_room(self) -> int:
        return SHARED_LIMIT - self.fixed_shared_bytes - 16

    @cached_property
    def packed_bytes(self) -> int:
        """A k-block of packed weights beside each stage, and what its stage has more for it; 0 without helpers."""
        scales = barriers = 16
        return self.weights.stream_bytes(BLOCK_N, BLOCK) + scales + barriers if self.variant.helpers else 0

    @cached_property
    def _stage_room(self) -> int:
        """A stage with its two mbarriers, and what belongs to it elsewhere."""
        return self.stage_bytes + 16 + self.packed_bytes

    @cached_property
    def stages(self) -> int:
        """Pipeline stages that fit, as far as the variant takes them."""
        fitting = (self._ring_room - MIN_DISPATCH_SLOTS * (DISPATCH_CHUNK + 8)) // self._stage_room
        return min(self.variant.most_stages, fitting)

    @cached_property
    def dispatch_slots(self) -> int:
        """Chunks of rows that dispatch keeps in flight: as many as still fit, two to eight."""
        return min(MAX_DISPATCH_SLOTS, (self._ring_room - self.stages * self._stage_room) // (DISPATCH_CHUNK + 8))

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        rings = self.stages * self._stage_room + self.dispatch_slots * (DISPATCH_CHUNK + 8)
        return -(-(rings + self.fixed_shared_bytes) // 16) * 16

    @cached_property
    def kernel_name(self) -> str:
        """Symbol of the kernel."""
        s = self.shape
        shared = f"_s{s.shared}" if s.shared else ""
        sizes = f"h{s.hidden}_i{s.intermediate}_e{s.experts}_k{s.topk}{shared}_r{self.ranks}"
        words = [*self.numerics.words(), *(["timeline"] if self.timeline else [])]
        if self.inputs is not Inputs.STAGED:
            words.append(self.inputs.value)
        if self.weights is not FP8:
            words.insert(0, self.weights.name)
        return "_".join(["megamoe", self.variant.value, sizes, *words])

    @classmethod
    def of_kernel_name(cls, name: str) -> KernelSpec | None:
        """The kernel with this symbol; None if it is none's.  Raises `ConfigError` if a part is not supported."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        hidden, intermediate, experts, topk, shared, ranks = (int(number or 0) for number in found.groups()[1:7])
        words = found[8].split("_")[1:]
        try:
            others = {"timeline", Inputs.RAW.value, *FORMATS}
            numerics = Numerics.named(word for word in words if word not in others)
        except ConfigError:
            return None
        weights = next((FORMATS[word] for word in words if word in FORMATS), FP8)
        shape, variant = MoEShape(hidden, intermediate, experts, topk, shared), Variant.parse(found[1])
        inputs = Inputs.RAW if Inputs.RAW.value in words else Inputs.STAGED
        options: dict[str, Any] = {"numerics": numerics, "weights": weights, "inputs": inputs}
        spec = cls(shape, variant, ranks, timeline="timeline" in words, **options)
        return spec if spec.kernel_name == name else None

    @property
    def template(self) -> str:
        """Path of the Jinja2 template under `kernels_src/`, the same for all."""
        return TEMPLATE

    @property
    def command(self) -> str:
        """Words of the command line that compile exactly this kernel.

        `warmup` makes none with a timeline, which only who measures the kernel itself asks for; `inspect` makes any.
        """
        if self.timeline:
            return f"inspect {self.kernel_name}"
        words = [warmup_words(self.shape, self.ranks, self.weights), f"--variant {self.variant.value}"]
        return " ".join([*words, *self.numerics.flags(), f"--inputs {self.inputs.value}"])

    @property
    def remark(self) -> str:
        """What to say beside `command`."""
        return "kernels with a timeline are for measuring the kernel alone" if self.timeline else ""

    def template_variables(self) -> dict[str, Any]:
        """What the Jinja2 template is filled with."""
        return {
            "kernel_name": self.kernel_name,
            "policy": self.variant.policy,
            "policy_header": self.variant.header,
            "weights": self.staged.policy,
            "weights_header": self.staged.header,
            "hidden": self.shape.hidden,
            "intermediate": self.shape.intermediate,
            "experts": self.shape.experts_of(self.ranks),
            "topk": self.shape.slots,
            "shared": self.shape.shared,
            "ranks": self.ranks,
            "stages": self.stages,
            "dispatch_slots": self.dispatch_slots,
            "shared_bytes": self.shared_bytes,
            "numerics": self.numerics.constants(),
            "timeline": "true" if self.timeline else "false",
            "inputs": self.inputs.value,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "shape": self.shape.to_json(),
            "variant": self.variant.value,
            "ranks": self.ranks,
            **self.numerics.options(),
            "timeline": self.timeline,
            "weights": self.weights.name,
            "inputs": self.inputs.value,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelSpec:
        """Inverse of `to_json`; raises `ConfigError` for what is no such data."""
        options = tuple(option.name for option in fields(Numerics))
        given = check_fields(
            "data", data, ("shape", "variant", "ranks", "fast_math"), ("timeline", "weights", "inputs", *options)
        )
        sizes = given["shape"]
        return cls(
            shape=MoEShape(**check_fields("shape", sizes, ("hidden", "intermediate", "experts", "topk"), ("shared",))),
            variant=Variant.parse(data["variant"]),
            ranks=data["ranks"],
            timeline=data.get("timeline", False),
            numerics=Numerics(**{name: data[name] for name in options if name in data}),
            weights=WeightFormat.parse(data.get("weights", FP8.name)),
            inputs=Inputs.parse(data.get("inputs", Inputs.STAGED.value)),
        )
