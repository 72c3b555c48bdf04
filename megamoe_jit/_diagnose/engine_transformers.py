"""What `doctor --engine transformers` asks."""

from __future__ import annotations

from collections.abc import Iterator

from megamoe_jit._diagnose.engines import EngineProbe, Hook
from megamoe_jit.transformers.fit import TESTED, WANTED, relied_upon

__all__ = ["PROBE"]


def _hooks() -> Iterator[Hook]:
    return (Hook(*found) for found in relied_upon())


PROBE = EngineProbe(
    name="transformers",
    distribution="transformers",
    wanted=WANTED,
    tested=TESTED,
    hooks=_hooks,
    typed=(
        "import megamoe_jit.transformers",
        'AutoModelForCausalLM.from_pretrained(..., experts_implementation="megamoe")',
    ),
    page="docs/models.md",
)
