"""The time model of heuristics: right where it can be counted, monotone, and recovered by the fit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe_jit._spec import MoEShape, Variant
from megamoe_jit.heuristics.model import Model, Sample, expected_blocks, expected_us, fit

FLASH = MoEShape(4096, 2048, 32, 6)
MODEL = Model(head_us=25.0, tile_us=1.2, k_block_us=0.5, stream_tb_s=4.2)


def drawn_blocks(shape: MoEShape, tokens: int, block_m: int, draws: int = 300) -> float:
    """The same by drawing experts."""
    rng, total = random.Random(1), 0
    for _ in range(draws):
        rows = [0] * shape.experts
        for _ in range(tokens):
            for expert in rng.sample(range(shape.experts), shape.topk):
                rows[expert] += 1
        total += sum(-(-count // block_m) for count in rows)
    return total / draws


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("tokens", [1, 7, 200, 340, 690])
def test_blocks_are_those_of_random_routing(tokens, block_m):
    shape = MoEShape(256, 128, 8, 3)
    assert expected_blocks(shape, tokens, block_m) == pytest.approx(drawn_blocks(shape, tokens, block_m), rel=0.02)


def test_blocks_where_every_token_has_every_expert():
    assert expected_blocks(MoEShape(128, 128, 2, 2), 129, 64) == pytest.approx(6)
    assert expected_blocks(MoEShape(128, 128, 1, 2), 64, 64) == pytest.approx(1)
    assert expected_blocks(FLASH, 0, 64) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 8000), st.integers(1, 500), st.sampled_from([64, 128]), st.integers(1, 64), st.integers(1, 8))
def test_more_tokens_never_need_less(tokens, more, block_m, experts, topk):
    shape = MoEShape(1024, 512, experts, topk)
    assert expected_blocks(shape, tokens + more, block_m) >= expected_blocks(shape, tokens, block_m) - 1e-6
    assert expected_blocks(shape, tokens, 64) >= expected_blocks(shape, tokens, 128) - 1e-6
    for variant in Variant:
        now, then = (expected_us(MODEL, shape, count, variant, 132) for count in (tokens, tokens + more))
        assert then >= now - 1e-6


def test_few_tokens_are_bound_by_weights_and_many_by_tiles():
    touched = 3 * 32 * 4096 * 2048 / 4.2e6
    assert expected_us(MODEL, FLASH, 64, Variant.COOPERATIVE, 132) == pytest.approx(25 + touched, rel=0.03)
    deep = 16 * 32 * 0.5 + 16 * 16 * 0.5
    tiles = expected_blocks(FLASH, 8192, 128) * (deep + (16 + 16) * 1.2) / 132
    assert expected_us(MODEL, FLASH, 8192, Variant.COOPERATIVE, 132) == pytest.approx(25 + tiles, rel=0.01)
    assert expected_us(MODEL, FLASH, 8192, Variant.COOPERATIVE, 66) > 1.9 * tiles


def test_the_fit_finds_constants_that_explain_the_times():
    samples = [
        Sample(shape, tokens, 132, expected_us(MODEL, shape, tokens, Variant.PINGPONG, 132))
        for shape in (FLASH, MoEShape(7168, 3072, 48, 6))
        for tokens in (1, 16, 64, 256, 512, 1024, 4096, 8192)
    ]
    model, off = fit(samples, Variant.PINGPONG)
    assert off < 1.03
    other = MoEShape(6144, 2048, 48, 8)
    for tokens in (32, 700, 3000):
        assert expected_us(model, other, tokens, Variant.PINGPONG, 132) == pytest.approx(
            expected_us(MODEL, other, tokens, Variant.PINGPONG, 132), rel=0.05
        )
