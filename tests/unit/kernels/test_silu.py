"""The exact silu of the kernels, built here: as good as a division, and right at the ends of its range."""

from __future__ import annotations

import math
import random
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from tests import host


@pytest.fixture(scope="module")
def silu(tmp_path_factory: pytest.TempPathFactory) -> partial[list[float]]:
    target = tmp_path_factory.mktemp("silu") / "silu"
    return partial(
        _values,
        host.build(host.SOURCES / "silu.cpp", target, "-iquote", str(host.SOURCES / "shim"), "-ffp-contract=off"),
    )


def _values(program: Path, arguments: Iterable[float]) -> list[float]:
    run = subprocess.run([program, *map(repr, arguments)], capture_output=True, text=True, check=True, timeout=60)
    return [float(line) for line in run.stdout.split()]


def test_values_are_those_of_a_division(silu: partial[list[float]]):
    dice = random.Random(1)
    xs = [dice.uniform(-86.9, 100) for _ in range(500)] + [dice.gauss(0, 2) for _ in range(1500)]
    for x, y in zip(xs, silu(xs), strict=True):
        assert y == pytest.approx(x / (1 + math.exp(-x)), rel=1e-6), x


def test_far_out_it_is_zero_or_the_number_itself(silu: partial[list[float]]):
    below = silu([-88.0, -100.0, -1e30, -3e38])
    assert below == [0.0] * 4
    assert silu([0.0, 100.0, 1e30, 3.3e38]) == [0.0, 100.0, pytest.approx(1e30), pytest.approx(3.3e38)]
    assert silu([math.inf]) == [math.inf]


def test_what_is_broken_stays_visible(silu: partial[list[float]]):
    assert all(map(math.isnan, silu([math.nan, -math.inf])))
