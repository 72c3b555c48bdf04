"""The divisions of the requantisation, built here: the scale is exact, its reciprocal to the last bit or one off."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests import host


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quotient") / "quotient"
    return host.build(host.SOURCES / "quotient.cpp", target, "-iquote", str(host.SOURCES / "shim"), "-ffp-contract=off")


@pytest.mark.parametrize("toward", ["0", "inf"])
def test_scales_are_those_of_a_division(program: Path, toward: str):
    dice = random.Random(1)
    magnitudes = [10 ** dice.uniform(-10, 30) for _ in range(3000)] + [448.0 * 2.0**e for e in range(-40, 60)]
    arguments = [toward, *map(repr, [1e-10, *magnitudes])]
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    off = 0
    for line in run.stdout.splitlines():
        scale, exact, inverse, exact_inverse = map(int, line.split())
        assert scale == exact
        assert abs(inverse - exact_inverse) <= 1
        off += inverse != exact_inverse
    assert off <= len(magnitudes) // 100
