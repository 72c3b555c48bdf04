"""What follows from rows and the card: limits, and how good the automatic choice was; pure arithmetic."""

from __future__ import annotations

import pytest

from megamoe_jit._bench.derived import COMPARED, add_limits, card_of, choice_quality, expected_experts, limit

FLASH = {"shape": "v4-flash", "hidden": 4096, "intermediate": 2048, "experts": 32, "topk": 6}


def row(tokens=64, time=200.0, variant="auto"):
    return {**FLASH, "tokens": tokens, "variant": variant, "median_us": time}


def test_expected_experts():
    assert expected_experts(32, 6, 0) == 0
    assert expected_experts(32, 6, 1) == pytest.approx(6)
    assert expected_experts(32, 6, 10_000) == pytest.approx(32)
    assert expected_experts(8, 8, 1) == 8


def test_the_limit_of_packed_weights_is_that_of_their_bytes():
    packed, plain = add_limits([{**row(8), "weights": "mxfp4"}, row(8)], "NVIDIA H200")
    assert packed["limit_us"] == pytest.approx(plain["limit_us"] * 4.25 / 8)


@pytest.mark.parametrize(
    ("device", "tokens", "bound", "least"),
    [
        ("NVIDIA H200", 1, "weights", 6 * 3 * 4096 * 2048 / 4.45e6),
        ("NVIDIA H100 80GB HBM3", 1, "weights", 6 * 3 * 4096 * 2048 / 3.09e6),
        ("NVIDIA H200", 8192, "flops", 6 * 8192 * 6 * 4096 * 2048 / 1400e6),
        ("NVIDIA H20", 1, None, None),
    ],
)
def test_the_limit_is_the_larger_of_two_times(device, tokens, bound, least):
    (one,) = add_limits([row(tokens, time=3000.0)], device)
    assert one["bound"] == bound
    for field, value in (
        ("limit_us", least),
        ("vs_limit", least and 3000 / least),
        ("limit_share", least and least / 3000),
    ):
        assert one[field] == (value and pytest.approx(value))
    assert {one[field] for field in COMPARED} == {None}, "nothing is compared with other kernels here"
    assert add_limits([one], device) == [one]


def test_choice_quality():
    rows = [
        row(tokens=64, time=100.0),
        row(tokens=64, time=99.0, variant="pingpong"),
        row(tokens=64, time=140.0, variant="cooperative"),
        row(tokens=256, time=104.0),
        row(tokens=256, time=100.0, variant="cooperative"),
        row(tokens=512, time=1.0),
    ]
    found = choice_quality(rows)
    assert (found["rows"], found["close"], found["shape"], found["tokens"]) == (2, 1, "v4-flash", 256)
    assert found["worst"] == pytest.approx(1.04)
    assert choice_quality(rows[-1:]) is None


def test_the_least_time_of_several_ranks_is_that_of_all_their_tokens_on_all_their_experts():
    """Each reads an equal part of the experts that the tokens of all touch; one token of one rank alone cannot say."""
    card = card_of("NVIDIA H200")
    one = {**row(1), "experts": 4, "topk": 6}
    (bound, time), whole = limit({**one, "ranks": 8}, card), limit({**one, "experts": 32, "tokens": 8}, card)
    assert bound == whole[0] == "weights"
    assert time == pytest.approx(whole[1] / 8)
