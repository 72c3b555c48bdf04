"""The expansion of packed weights, built here: bit for bit the e5m2 codes of their values, in the order of tiles."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megamoe_jit._layer import fp8, mxfp4
from megamoe_jit._spec import MXFP4
from tests import host

PIECE_CODES, PIECE_EXPONENTS = 64 * 128 // 2, 64 * 128 // 32


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("expand") / "expand"
    return host.build(host.SOURCES / "expand.cpp", target, "-iquote", str(host.SOURCES / "plain"), "-Wno-unused")


def expanded(program: Path, codes: torch.Tensor, exponents: torch.Tensor, way: str) -> torch.Tensor:
    """A packed matrix as the kernel expands it, 64 rows of a k-block after the other."""
    pieces = torch.cat([codes.view(-1, PIECE_CODES), exponents.view(-1, PIECE_EXPONENTS)], 1)
    run = subprocess.run([program, way], input=pieces.numpy().tobytes(), capture_output=True, check=True)
    return torch.frombuffer(bytearray(run.stdout), dtype=torch.uint8)


@pytest.mark.parametrize("way", ["rows", "groups"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("rows", "depth"), [(256, 128), (512, 384), (384, 256), (128, 128)])
def test_a_matrix_becomes_the_e5m2_codes_of_its_values(program: Path, rows: int, depth: int, gated: bool, way: str):
    """Every code beside every exponent there is, zeros with their signs; also tiles of half the rows."""
    if gated and rows % 256:
        rows += 128
    dice = torch.Generator().manual_seed(rows + depth)
    codes = torch.randint(0, 256, (rows, depth // 2), generator=dice, dtype=torch.uint8)
    powers = torch.randint(-13, 14, (rows, depth // MXFP4.group), generator=dice)
    exponents = mxfp4.pack_exponents((powers + 16).to(torch.uint8), gated)
    got = expanded(program, mxfp4.pack(codes, gated), exponents, way)
    values = mxfp4.dequantize(codes, (powers + 127).to(torch.uint8))
    want = values.to(torch.float8_e5m2)
    assert torch.equal(want.float(), values)  # exact
    assert torch.equal(got.view(rows, depth), fp8.pack(want.view(torch.uint8), gated))


def test_lanes_that_read_or_write_at_once_want_other_banks(program: Path):
    """Those of decode and wide, and the helpers of unpack."""
    assert subprocess.run([program, "banks"], capture_output=True, check=True, text=True).stdout.split() == ["1", "1"]
