"""Which sources a measurement is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megamoe_jit._version import __version__

ROOT = Path(__file__).resolve().parents[1]


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit of this checkout (`-dirty` where files differ from it); outside of one the package version."""
    head = _git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if not head:
        return f"v{__version__}"
    return f"{head}-dirty" if _git("status", "--porcelain") else head
