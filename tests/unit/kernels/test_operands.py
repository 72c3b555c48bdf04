"""From a matrix of four-bit weights to what the tensor cores multiply: packed, then read by the kernel's own code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megamoe_jit._layer.mxfp4 import MAGNITUDES
from megamoe_jit._layer.tiles import interleave
from megamoe_jit._spec.formats import MXFP4
from tests import host

TILE, DEPTH = 256, 128  #: of a k-block


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("operands") / "operands"
    paths = ("-iquote", str(host.SOURCES), "-iquote", str(host.SOURCES / "shim"))
    return host.build(host.SOURCES / "operands.cpp", target, "-Wno-unknown-pragmas", *paths)


def multiplied(program: Path, codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Float32 ``[rows, depth]`` of packed codes and exponents, as A fragments of m64k32 products give it."""
    rows, depth = codes.shape[0], codes.shape[1] * 2
    parts, at = [], 0
    for height in (min(TILE, rows - first) for first in range(0, rows, TILE)):
        blocks = depth // DEPTH
        bytes_of = [
            t.reshape(-1)[at * w : (at + height) * w].reshape(blocks, -1)
            for t, w in ((codes, depth // 2), (exponents, depth // 32))
        ]
        stages = torch.cat(bytes_of, 1).contiguous().numpy().tobytes()
        done = subprocess.run([program, str(height)], input=stages, capture_output=True, check=True, timeout=60)
        read = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
        # k-block, m64, warp, lane / 4, lane % 4, k32, sixteen columns, below, byte
        held = read.view(blocks, height // 64, 4, 8, 4, 4, 2, 2, 4)
        parts.append(held.permute(1, 2, 7, 3, 0, 5, 6, 4, 8).reshape(height, depth))
        at += height
    return torch.cat(parts).view(torch.float8_e5m2).float()


@pytest.mark.parametrize(("rows", "depth", "gated"), [(512, 256, True), (384, 128, False), (128, 384, False)])
def test_every_weight_is_where_it_belongs_and_exact(program: Path, rows: int, depth: int, gated: bool):
    gen = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows, depth // 2), generator=gen).to(torch.uint8)
    exponents = torch.randint(3, 30, (rows, depth // 32), generator=gen).to(torch.uint8)
    found = multiplied(program, MXFP4.pack(codes, gated), MXFP4.pack_exponents(exponents, gated))
    table = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])
    values = table[torch.stack((codes & 15, codes >> 4), -1).reshape(rows, depth).long()]
    expected = values * torch.exp2(exponents.float() - 16).repeat_interleave(32, 1)
    if gated:
        expected = interleave(expected)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())  # of zeros too


def test_groups_of_zeros_may_have_any_exponent(program: Path):
    codes, exponents = torch.zeros(128, 64, dtype=torch.uint8), torch.arange(512).to(torch.uint8).reshape(128, 4)
    codes[:, ::3] = 0x80  # a zero and a negative one
    found = multiplied(program, MXFP4.pack(codes, False), MXFP4.pack_exponents(exponents, False))
    assert torch.equal(found, torch.zeros(128, 128))
    assert int(found.signbit().sum()) == 128 * 22
