"""Starts `upstream_program.py`, with this package under DeepGEMM's name, as torchrun would: a process for each rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("upstream_program.py")
RENAMED = (
    "import sys, runpy, megamoe_jit; sys.modules['deep_gemm'] = megamoe_jit; "
    f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
)


def run_program(ranks: int, timeout_s: float = 180.0) -> list[tuple[int, str]]:
    """Exit code and output of each rank, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MEGAMOE_JIT_TIMEOUT_S": 10}
    path = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    common = {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RENAMED],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [each.communicate(timeout=timeout_s)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, output) for each, output in zip(started, outputs, strict=True)]
