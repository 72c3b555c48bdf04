"""Which sources a measurement is of."""

from __future__ import annotations

from pathlib import Path

from megamoe_jit._bench.conditions import output_of
from megamoe_jit._version import __version__

ROOT = Path(__file__).resolve().parents[1]


def commit(root: Path | None = None) -> str:
    """The commit of a checkout, by default of this one, with `-dirty` where files differ from it.

    Of what is no checkout, the version of the package if it is this one, else "not known".
    """
    place = ROOT if root is None else root
    git = "git", "-C", str(place)
    head = output_of(*git, "rev-parse", "--short=12", "HEAD") if (place / ".git").exists() else None
    if not head:
        return f"v{__version__}" if root is None else "not known"
    return f"{head}-dirty" if output_of(*git, "status", "--porcelain") else head
