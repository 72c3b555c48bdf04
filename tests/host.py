"""Index arithmetic of the kernels, built with the machine's C++17 compiler so that tests can call it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PATIENCE = 600  #: seconds after which something hangs, on a busy machine too
KERNELS = Path(__file__).resolve().parents[1] / "kernels_src"
SOURCES = Path(__file__).resolve().parent / "unit" / "host"


def compiler() -> str:
    """A C++17 compiler; skips the test if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip("needs a C++17 compiler: $CXX, c++, g++ or clang++ (only tests do)")


def build(source: Path, target: Path, *options: str) -> Path:
    """Compile one file that includes rooms of `kernels_src/`."""
    command = [compiler(), "-std=c++17", "-O1", "-Wall", "-I", str(KERNELS), *options, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return target


def without_comments(text: str) -> str:
    """C++ text with comments blanked; lines keep their numbers."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


@functools.cache
def room(name: str) -> str:
    """A room of `kernels_src/` without its comments."""
    return without_comments((KERNELS / name).read_text())
