"""What `doctor --engine flashinfer` asks."""

from __future__ import annotations

from collections.abc import Iterator

from megamoe_jit._diagnose.engines import EngineProbe, Hook
from megamoe_jit.engines.flashinfer.seams import SEAMS, TESTED, WANTED
from megamoe_jit.engines.seams import asked

__all__ = ["PROBE"]


def _hooks() -> Iterator[Hook]:
    return (Hook(*found) for found in asked(SEAMS, "flashinfer"))


PROBE = EngineProbe(
    name="flashinfer",
    distribution="flashinfer-python",
    wanted=WANTED,
    tested=TESTED,
    hooks=_hooks,
    typed=(
        "from megamoe_jit.engines.flashinfer import MegaMoeConfig, register; register()",
        "MoEEpLayer(..., backend=MegaConfig(megakernel=MegaMoeConfig(intermediate_size, top_k)))",
    ),
    page="docs/models.md",
)
