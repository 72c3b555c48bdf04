"""MXFP4 weights: the order in which the kernel reads them, exactness, and what callers give and get back."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamoe_jit._layer import mxfp4
from megamoe_jit._spec.formats import MXFP4


def draw(*shape: int, top: int = 256, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, shape, generator=gen, dtype=torch.int64).to(torch.uint8)


def code_at(codes: torch.Tensor, row: int, column: int) -> int:
    """As checkpoints have it: the low nibble is the even column."""
    byte = int(codes[row, column // 2])
    return byte >> 4 if column % 2 else byte & 15


def plain_row(row: int, gated: bool, rows: int) -> int:
    """Of the matrix that callers bring, the row that is `row` of the kernel's."""
    if not gated:
        return row
    group, within = divmod(row, 16)
    return group * 8 + within % 8 + (rows // 2 if within >= 8 else 0)


@pytest.mark.parametrize(("rows", "depth", "gated"), [(256, 128, True), (384, 256, False), (128, 128, False)])
def test_words_hold_what_a_thread_multiplies(rows, depth, gated):
    codes = draw(rows, depth // 2)
    packed = MXFP4.pack(codes, gated).reshape(-1)
    words, at = packed.view(torch.int32), 0
    for tile in range(0, rows, 256):
        height = min(256, rows - tile)
        order = itertools.product(range(depth // 128), range(height // 64), range(2), range(128), range(4))
        for block, m, half, place, j in order:
            word = int(words[at]) & 0xFFFFFFFF
            at += 1
            if (place * 7 + j + m) % 5:  # a part of them, which varies: all take seconds
                continue
            warp, there = divmod(place, 32)
            lane = there ^ there // 8
            row = plain_row(tile + 64 * m + 16 * warp + lane // 4 + 8 * (j % 2), gated, rows)
            for x in range(8):
                column = 128 * block + (2 * half + j // 2) * 32 + 4 * (lane % 4) + x % 4 + x // 4 * 16
                sign = word >> (8 * x + 7 if x < 4 else 8 * (x - 4) + 3) & 1
                assert word >> 4 * x & 7 | sign << 3 == code_at(codes, row, column)
    assert at == words.numel()


@pytest.mark.parametrize(("rows", "depth", "gated"), [(512, 384, True), (384, 256, False), (128, 128, False)])
def test_exponents_lie_beside_their_rows(rows, depth, gated):
    exponents = draw(rows, depth // 32)
    packed, at = MXFP4.pack_exponents(exponents, gated).reshape(-1).tolist(), 0
    plain = exponents.tolist()
    for tile in range(0, rows, 256):
        height = min(256, rows - tile)
        order = itertools.product(range(depth // 128), range(height // 64), range(4), range(8), range(2), range(4))
        for block, m, warp, quad, below, group in order:
            row = plain_row(tile + 64 * m + 16 * warp + quad + 8 * below, gated, rows)
            assert packed[at] == plain[row][4 * block + group]
            at += 1
    assert at == exponents.numel()


@pytest.mark.parametrize(("rows", "depth", "gated"), [(256, 128, True), (768, 384, True), (384, 256, False)])
def test_unpacking_undoes_packing(rows, depth, gated):
    codes, exponents = draw(rows, depth // 2), draw(rows, depth // 32, seed=1)
    before = codes.clone(), exponents.clone()
    assert torch.equal(MXFP4.unpack(MXFP4.pack(codes, gated), gated), codes)
    assert torch.equal(MXFP4.unpack_exponents(MXFP4.pack_exponents(exponents, gated), gated), exponents)
    assert torch.equal(before[0], codes), "what is packed stays as it was"
    assert torch.equal(before[1], exponents)


def test_values_are_those_of_the_standard():
    """Every code with every exponent that is a number, against a decoder that knows bits of e2m1 alone."""
    codes = torch.tensor([2 * pair | (2 * pair + 1) << 4 for pair in range(8)] * 2, dtype=torch.uint8)
    exponents = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    values = mxfp4.dequantize(codes.expand(255, 16), exponents[:, None])
    for byte, row in enumerate(values.double().tolist()):
        for column, value in enumerate(row):
            code = column % 16
            exponent, mantissa = code >> 1 & 3, code & 1
            magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            wanted = magnitude * 2.0 ** (byte - 127)
            assert abs(value) == (wanted if wanted < 2.0**128 else float("inf"))
            assert str(value).startswith("-") == (code >= 8), "-0 too"
    assert mxfp4.dequantize(codes[None], torch.tensor([[255]], dtype=torch.uint8)).isnan().all()
