"""The examples to their end, each as its header says; what a CPU sees of them is tested in `tests/unit/package`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stubs import REPO

EXAMPLES = REPO / "examples"


def run(*command: str, **variables: str) -> str:
    """What it prints; fails unless it ends well."""
    environ = {**os.environ, "PYTHONPATH": str(REPO), "PYTHON": sys.executable, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layer():
    assert "torch.bfloat16 (100, 512), " in run(sys.executable, str(EXAMPLES / "layer.py"))


def test_one_rank():
    said = run(sys.executable, str(EXAMPLES / "ranks.py"))
    assert said.startswith("rank 0 of 1: 128 tokens, 512 rows, ")


def test_cuda_graph():
    said = run(sys.executable, str(EXAMPLES / "cuda_graph.py"), "--replays", "2").splitlines()
    assert said == [f"replay {number}: the bits of an eager call" for number in (1, 2)]


@pytest.mark.timeout(300)
def test_an_image_runs_what_it_was_warmed_up_for_and_compiles_nothing(tmp_path: Path):
    kernels = str(tmp_path / "kernels")
    run("sh", str(EXAMPLES / "docker/warm_kernels.sh"), str(EXAMPLES / "docker/shapes.toml"), kernels)
    image = {"MEGAMOE_JIT_READONLY_CACHE": kernels, "MEGAMOE_JIT_DISABLE_JIT": "1"}
    place = {"MEGAMOE_JIT_CACHE_DIR": str(tmp_path / "empty")}
    assert "torch.bfloat16" in run(sys.executable, str(EXAMPLES / "layer.py"), **image, **place)
    assert not list(tmp_path.glob("empty/**/kernel.cubin"))
