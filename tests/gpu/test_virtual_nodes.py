"""Two nodes of one, two and four ranks on one GPU: see `tests/gpu/virtual_nodes.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import virtual_nodes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
@pytest.mark.timeout(600)
def test_two_nodes_agree_with_the_reference(ranks_per_node):
    command = [sys.executable, "-m", "tests.gpu.virtual_nodes", str(ranks_per_node)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert {name: problem for name, problem in found.items() if problem} == {}, done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(found) == set(virtual_nodes.CHECKS)
