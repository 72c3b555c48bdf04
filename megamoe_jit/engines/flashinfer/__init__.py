"""A mega kernel of FlashInfer's expert-parallel MoE: `register()`, then `MegaConfig(megakernel=MegaMoeConfig(...))`.

FlashInfer calls no plug-in of its own accord, so a program, or an engine that uses it, calls `register`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe_jit.engines.aside import guarded
from megamoe_jit.engines.flashinfer.seams import KERNEL_NAME, SEAMS
from megamoe_jit.engines.seams import fits

__all__ = ["KERNEL_NAME", "MegaMoeConfig", "register"]


@dataclass(frozen=True)
class MegaMoeConfig:
    """The sizes that FlashInfer's `FleetParams` does not have.

    Attributes:
        intermediate_size: columns between the two products, a multiple of 128.
        top_k: slots of a token.
        activation_clamp: of SwiGLU, 0 or more; None for none.
        kernel_name: by which FlashInfer finds the backend.
    """

    intermediate_size: int
    top_k: int
    activation_clamp: float | None = None
    kernel_name: str = KERNEL_NAME


@guarded("flashinfer")
def register() -> None:
    """Add the kernel to FlashInfer, if the installed release is as expected; else warn once and leave it alone."""
    if not fits("flashinfer", SEAMS):
        return
    from megamoe_jit.engines.flashinfer import backend

    backend.add()
