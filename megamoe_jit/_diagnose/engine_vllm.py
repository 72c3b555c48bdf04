"""What `doctor --engine vllm` asks."""

from __future__ import annotations

from collections.abc import Iterator

from megamoe_jit._diagnose.engines import EngineProbe, Hook
from megamoe_jit.engines.seams import asked
from megamoe_jit.engines.vllm.seams import SEAMS, TESTED, WANTED

__all__ = ["PROBE"]


def _hooks() -> Iterator[Hook]:
    return (Hook(*found) for found in asked(SEAMS, "vllm"))


PROBE = EngineProbe(
    name="vllm",
    distribution="vllm",
    wanted=WANTED,
    tested=TESTED,
    hooks=_hooks,
    typed=(
        "vllm serve MODEL --quantization megamoe_jit",
        "vllm serve MODEL --quantization megamoe_jit --data-parallel-size N --enable-expert-parallel",
    ),
    page="docs/models.md",
)
