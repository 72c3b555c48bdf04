"""The plots of `megamoe-jit bench --plot` with other kernels and goals in them, by the normalised times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.goals import judged
from megamoe_jit._bench import plot

BESIDE = (("best_known_us", "k--", "best known"), ("aim_us", "g:", "aim"))


def _share(row: Mapping[str, Any]) -> float:
    return float(row["normalised_limit_share"] or row["limit_share"])


def draw(doc: Mapping[str, Any], folder: Path, files: str = "{}.svg") -> list[Path]:
    """Draw a document, which may be an old one: its rows are judged anew.

    Args:
        doc: of `bench`.
        folder: made if it is not there.
        files: see `plot.draw`.
    """
    best = ("best_known_us", "best known kernel")
    return plot.draw(judged(doc), folder, beside=BESIDE, share=_share, best=best, files=files)
