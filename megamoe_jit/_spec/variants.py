"""The kernel variants: how the two math warpgroups of a block share the work.

One line here and one policy in `kernels_src/variants/` are a variant; whatever lists variants asks `Variant`
(docs/how-to/add-a-kernel-variant.md).
"""

from __future__ import annotations

from enum import StrEnum

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.formats import WeightFormat
from megamoe_jit._text import shown

AUTO = "auto"  #: lets the heuristics choose


class Variant(StrEnum):
    """A variant by its name, with its traits.

    Attributes:
        block_m: rows of a tile, at most; the policy's `kBlockM`.
        what: a sentence for people.
        codes: of weights that its `Math` multiplies, as `WeightFormat.what` calls them.
        most_stages: pipeline stages that it has at most, where more would leave dispatch too little room.
        helpers: its warpgroups behind the math warpgroups, which unpack the weights of a ring of packed k-blocks, of as
            many places as stages; the policy's `kHelpers`.
    """

    block_m: int
    what: str
    codes: tuple[str, ...]
    most_stages: int
    helpers: int

    def __new__(
        cls,
        name: str,
        block_m: int,
        what: str,
        codes: tuple[str, ...] = ("e4m3", "e5m2"),
        most_stages: int = 8,
        helpers: int = 0,
    ) -> Variant:
        """A member is written as its name and traits, and is a string that equals the name."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.block_m, member.what, member.codes = block_m, what, codes
        member.most_stages, member.helpers = most_stages, helpers
        return member

    PINGPONG = "pingpong", 64, "Each math warpgroup owns a whole tile, half a cycle out of phase."
    COOPERATIVE = "cooperative", 128, "Both math warpgroups split the rows of one tile and share its weights."
    DECODE = "decode", 64, "Operands swapped, for few rows: weights are the rows of a product.", ("e4m3", "e2m1")
    WIDE = "wide", 80, "As decode, in larger tiles: packed weights are expanded once for all rows.", ("e2m1",), 7
    UNPACK = "unpack", 128, "As cooperative, and other warps unpack the next weights meanwhile.", ("e2m1",), 8, 1
    PREFILL = "prefill", 128, "As cooperative, and expands packed weights in memory first, for many rows.", ("e2m1",)

    @property
    def expands(self) -> bool:
        """Whether it expands weights in memory before it multiplies them."""
        return self is Variant.PREFILL

    @property
    def policy(self) -> str:
        """The policy struct in the kernel sources."""
        return self.value.title().replace("_", "")

    @property
    def header(self) -> str:
        """The room that defines it."""
        return f"variants/{self.value}.cuh"

    @classmethod
    def reading(cls, weights: WeightFormat) -> tuple[Variant, ...]:
        """The variants that multiply weights of this format."""
        return tuple(variant for variant in cls if weights.what in variant.codes)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant named `text`; raises `ConfigError` with the names there are."""
        for variant in cls:
            if isinstance(text, str) and text == variant.value:
                return variant
        raise ConfigError(f"unknown kernel variant {shown(text)}; allowed: {', '.join(cls)}")


VARIANT_NAMES = tuple(variant.value for variant in Variant)
VARIANT_CHOICES = (AUTO, *VARIANT_NAMES)  #: what a call may ask for
