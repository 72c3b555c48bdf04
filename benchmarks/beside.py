"""Another checkout's package beside this one's, in one process, so that both can be timed in turns.

The copy has another name, in its own sources too, and so modules, kernels, operators of torch and settings of its own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

PACKAGE = "megamoe_jit"
_WORD = re.compile(rf"\b{PACKAGE}\b")


def another_checkout(text: str) -> Path:
    """The root of a checkout that an argument names; argparse says what is wrong with one that is not there."""
    root = Path(text)
    if not (root / PACKAGE).is_dir():
        allowed = f"the root of another checkout; `git worktree add --detach {text} HEAD` makes one"
        raise argparse.ArgumentTypeError(f"{text} has no folder {PACKAGE}; allowed: {allowed}")
    return root


def put_beside(checkout: Path, name: str, folder: Path) -> None:
    """Copy the package of a checkout to `folder` under another name, and have this process and its children find it.

    Args:
        checkout: its root.
        name: what the copy is called, an identifier.
        folder: where to; it has no package of this name yet.
    """
    copy = folder / name
    shutil.copytree(checkout / PACKAGE, copy, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(_WORD.sub(name, text), encoding="utf-8")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # processes of ranks are given the path of this one
