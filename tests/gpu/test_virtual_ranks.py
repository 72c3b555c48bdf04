"""The protocol of 2, 4 and 8 ranks on one GPU: see `tests/gpu/virtual.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import virtual

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[2, 4, 8])
def outcome(request):
    """Of each check, by name: what is wrong."""
    command = [sys.executable, "-m", "tests.gpu.virtual", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return request.param, found, done


@pytest.mark.timeout(900)
def test_all_ranks_agree_with_the_reference(outcome):
    ranks, found, done = outcome
    wrong = {name: problem for name, problem in found.items() if problem}
    assert not wrong
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(found) == set(virtual.names(ranks))
