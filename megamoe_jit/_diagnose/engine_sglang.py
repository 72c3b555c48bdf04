"""What `doctor --engine sglang` asks."""

from __future__ import annotations

from collections.abc import Iterator

from megamoe_jit._diagnose.engines import EngineProbe, Hook
from megamoe_jit.engines.seams import asked
from megamoe_jit.engines.sglang.seams import MEGA, RUNNER, SHARED, TESTED, WANTED

__all__ = ["PROBE"]


def _hooks() -> Iterator[Hook]:
    return (Hook(*found) for found in asked((*SHARED, *MEGA, *RUNNER), "sglang"))


PROBE = EngineProbe(
    name="sglang",
    distribution="sglang",
    wanted=WANTED,
    tested=TESTED,
    hooks=_hooks,
    typed=(
        "sglang serve --model-path MODEL --tp N --ep N --moe-a2a-backend megamoe",
        "sglang serve --model-path MODEL --tp N --moe-runner-backend megamoe_jit",
    ),
    page="docs/models.md",
)
