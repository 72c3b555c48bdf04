"""Packs of another compiler: built by the NVRTC of one CUDA major, used where that of another is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamoe_jit._compile.toolchain import Candidate, candidates
from megamoe_jit._settings.settings import override
from tests.stubs import REPO

NVRTC = "MEGAMOE_JIT_NVRTC"


def two_compilers() -> tuple[Candidate, Candidate]:
    """The NVRTC that is found by itself and one of another CUDA major; skips the test where there are not both.

    The other one is what MEGAMOE_JIT_NVRTC names, or else any that the search finds as well.
    """
    with override(nvrtc=None):
        found = candidates()
    if not found:
        pytest.skip("no NVRTC is found without MEGAMOE_JIT_NVRTC")
    named = os.environ.get(NVRTC)
    if named:
        with override(nvrtc=Path(named)):
            others = candidates()
    else:
        others = found
    other = next((each for each in others if each.major not in (0, found[0].major)), None)
    if other is None:
        pytest.skip(
            f"only NVRTC {found[0].major} is here ({found[0].path}); set {NVRTC} to a libnvrtc.so of another CUDA major"
        )
    return found[0], other


def environment(**variables: object) -> dict[str, str]:
    """That of a user who has set these and nothing else of ours, and who has the checkout on the Python path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEGAMOE_JIT_")}
    ours = {"PYTHONPATH": REPO, "MEGAMOE_JIT_CONFIG": os.devnull, **variables}
    return {**kept, **{name: str(value) for name, value in ours.items()}}


def command(*words: object, **variables: object) -> dict[str, Any]:
    """Run a command of ours in a new process; the document it prints."""
    line = [sys.executable, "-m", "megamoe_jit", *map(str, words), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(**variables), timeout=240)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def build(place: Path, compiler: Candidate, *sizes: int) -> Path:
    """Compile the kernels of a layer with a compiler, and carry them in a pack into a directory of ready kernels.

    Args:
        place: an empty directory.
        compiler: the NVRTC to use.
        sizes: hidden and intermediate size, experts, top-k.

    Returns:
        The directory, for MEGAMOE_JIT_READONLY_CACHE.
    """
    options = zip(("--hidden", "--intermediate", "--experts", "--topk"), sizes, strict=True)
    shape = [word for option in options for word in option]
    built = command("warmup", *shape, "--cache-dir", place / "build", **{NVRTC: compiler.path})
    assert {kernel["nvrtc"].split(".")[0] for kernel in built["kernels"]} == {str(compiler.major)}
    command("cache", "export", place / "kernels.tgz", "--cache-dir", place / "build")
    imported = command("cache", "import", place / "kernels.tgz", "--cache-dir", place / "kernels")
    assert set(imported["imported"]) == {kernel["key"] for kernel in built["kernels"]}
    return place / "kernels"


def use(code: str, place: Path, kernels: Path) -> dict[str, Any]:
    """Run Python code in a new process that finds its own NVRTC and may not compile; the last line is a document."""
    variables = {
        "MEGAMOE_JIT_READONLY_CACHE": kernels,
        "MEGAMOE_JIT_CACHE_DIR": place / "empty",
        "MEGAMOE_JIT_DISABLE_JIT": 1,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables), timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document
