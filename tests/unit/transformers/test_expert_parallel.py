"""Experts on two ranks by transformers' own hooks: each has half of them, ids of the others' are masked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from tests.stubs import REPO


def test_two_ranks_have_the_logits_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "tests.unit.transformers.ep_ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*words, str(rank), port], stdout=subprocess.PIPE, text=True, cwd=REPO, env=environment)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=120)
            _, experts, diff = said.split()
            assert (rank.returncode, int(experts)) == (0, 2)
            assert float(diff) < 1e-6
    finally:
        for rank in ranks:
            rank.kill()
