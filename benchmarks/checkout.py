"""Which sources a measurement is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megamoe_jit._version import __version__

ROOT = Path(__file__).resolve().parents[1]


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(root: Path | None = None) -> str:
    """The commit of a checkout, by default of this one, with `-dirty` where files differ from it.

    Of what is no checkout, the version of the package if it is this one, else "not known".
    """
    place = ROOT if root is None else root
    head = _git(place, "rev-parse", "--short=12", "HEAD") if (place / ".git").exists() else None
    if not head:
        return f"v{__version__}" if root is None else "not known"
    return f"{head}-dirty" if _git(place, "status", "--porcelain") else head
