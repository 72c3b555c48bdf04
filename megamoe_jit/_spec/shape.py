"""Sizes of a layer, and how large they may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megamoe_jit._documents import Count
from megamoe_jit._spec.abi import QUANT_BLOCK
from megamoe_jit._spec.checks import check, check_int

MAX_TOPK = 32
MAX_SIZE = 262144  #: of hidden and intermediate; kernels for larger ones spill
MAX_EXPERTS = 1024
MAX_TOKENS = 32768
BLOCK = QUANT_BLOCK  #: quantisation block, in both directions


@dataclass(frozen=True, slots=True)
class MoEShape:
    """Sizes of one MoE layer.

    Attributes:
        hidden: columns of a token, a multiple of 128 up to 262144.
        intermediate: columns between the two products, likewise.
        experts: that the router chooses from, those of all ranks, 1 to 1024.
        topk: slots of a token that the router fills, 1 to 32.
        shared: experts of the same sizes that every token goes to beside, 0 or more; each rank has all of them.

    Raises:
        ConfigError: a size is not supported.
    """

    hidden: Count
    intermediate: Count
    experts: Count
    topk: Count
    shared: Count = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_int(field.name, getattr(self, field.name))
        for name, size in (("hidden", self.hidden), ("intermediate", self.intermediate)):
            fits = 0 < size <= MAX_SIZE and size % BLOCK == 0
            check(fits, name, size, f"a multiple of 128 from 128 to {MAX_SIZE}")
        check(1 <= self.experts <= MAX_EXPERTS, "experts", self.experts, f"1 to {MAX_EXPERTS}")
        check(1 <= self.topk <= MAX_TOPK, "topk", self.topk, f"1 to {MAX_TOPK}")
        most = min(MAX_TOPK - self.topk, MAX_EXPERTS - self.experts)
        limits = f"{MAX_TOPK} slots and {MAX_EXPERTS} experts with those of the router"
        check(0 <= self.shared <= most, "shared", self.shared, f"0 to {most}, for {limits}")

    @property
    def slots(self) -> int:
        """Rows that a token is sent as: those of the router, then those of shared experts."""
        return self.topk + self.shared

    @property
    def routed(self) -> MoEShape:
        """The same layer without shared experts."""
        return replace(self, shared=0) if self.shared else self

    def experts_of(self, ranks: int) -> int:
        """Experts whose weights live on all of so many ranks: each has the shared ones."""
        return self.experts + self.shared * ranks

    def to_json(self) -> dict[str, Any]:
        """Plain data; without `shared` where there are none."""
        sizes = asdict(self)
        return sizes if self.shared else {name: size for name, size in sizes.items() if name != "shared"}
