"""The example of several ranks under torchrun, as its header says."""

import os
import re
import subprocess
import sys

from tests.stubs import REPO


def test_ranks(ranks: int):
    ranks = max(r for r in (1, 2, 4, 8) if r <= ranks)  # 16 experts
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--local-addr", "127.0.0.1")
    done = subprocess.run(
        [sys.executable, *launcher, str(REPO / "examples/ranks.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(re.findall(r"rank (\d) of (\d): (\d+) tokens, (\d+) rows", done.stdout))
    assert [(int(rank), int(of), int(tokens)) for rank, of, tokens, _ in lines] == [
        (rank, ranks, 128 - 13 * rank) for rank in range(ranks)
    ]
    assert sum(int(rows) for *_, rows in lines) == 4 * sum(128 - 13 * rank for rank in range(ranks)), "none is lost"
