"""`PassSpec`: a kernel of one pass over rows that travel between nodes."""

from __future__ import annotations

from enum import StrEnum

from megamoe_jit._spec.any_layer import ForAnyLayer


class Pass(StrEnum):
    """What is done."""

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
    """One such kernel."""

    __slots__ = ()
    word = "nodes"
    kinds = Pass

    def template_variables(self) -> dict[str, int | str]:
        """What the Jinja2 template is filled with."""
        return {"kernel_name": self.kernel_name, "function": self.kind.function}
