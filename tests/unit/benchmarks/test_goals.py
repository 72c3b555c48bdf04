"""What rows are held against: other kernels, goals, the card's own speed; pure arithmetic."""

from __future__ import annotations

import pytest

from benchmarks import goals
from benchmarks.goals import DENSE, READ, annotate, summarise
from megamoe_jit._bench import measure as _bench
from megamoe_jit._bench.derived import CARDS, card_of, limit
from megamoe_jit._cli._options import TIMED_SHAPES
from megamoe_jit.heuristics.presets import parse_shapes, preset

KNOWN = goals.load()
H200, H100, H20 = "NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H20"
ANCHORS = [{DENSE: 1400.0, READ: 4.40}, {DENSE: 1430.0, READ: 4.38}]


def row(shape="v4-flash", tokens=64, time=200.0, variant="auto", correct=True, **more):
    made = _bench.cases([preset(shape)], [tokens])[0].shape
    sizes = {name: getattr(made, name) for name in ("hidden", "intermediate", "experts", "topk")}
    return {
        "shape": shape,
        **sizes,
        "tokens": tokens,
        "variant": variant,
        "median_us": time,
        "correct": correct,
        **more,
    }


def only(device=H200, **more):
    return annotate([row(**more)], device, ANCHORS, KNOWN)[0]


def test_targets_cover_the_default_rows():
    work = _bench.cases(parse_shapes(TIMED_SHAPES), _bench.DEFAULT_TOKENS)
    assert len(work) == len(KNOWN.rows) == 28
    for case in work:
        h200, h100, other = (only(d, shape=case.name, tokens=case.tokens, time=1000.0) for d in (H200, H100, H20))
        assert h200["limit_us"] < h200["aim_us"] < h200["must_us"] < h200["best_known_us"] < h100["best_known_us"]
        assert h200["vs_best_known"] == pytest.approx(1000 / h200["best_known_us"])
        assert h100["limit_us"] < h100["must_us"] == h100["best_known_us"]
        assert h100["aim_us"] is h100["normalised_us"] is None
        assert {v for k, v in other.items() if k not in row() or k in ("bound",)} == {None}


def test_the_computed_limit_is_that_of_the_targets():
    card = card_of(H200)
    for target in KNOWN.rows:
        bound, time = limit({**target, "experts": target["experts_per_gpu"], "tokens": target["tokens_per_gpu"]}, card)
        assert time == pytest.approx(target["limit_us"], abs=0.5)
        assert bound == (
            "weights"
            if target["tokens_per_gpu"] < 1024 or (target["shape"], target["tokens_per_gpu"]) == ("v4-pro", 1024)
            else "flops"
        )


def test_packed_weights_have_the_limit_of_their_own_bytes_and_no_targets_yet():
    packed, plain = only(weights="mxfp4"), only()
    assert packed["limit_us"] == pytest.approx(plain["limit_us"] * 4.25 / 8, rel=0.01)
    assert [packed[goal] for goal in ("best_known_us", "must_us", "aim_us", "vs_best_known")] == [None] * 4
    assert packed["limit_share"] == pytest.approx(packed["limit_us"] / 200)


def test_every_card_with_targets_has_a_limit():
    assert {card.name for card in KNOWN.cards} == {card.name for card in CARDS}


def test_times_are_normalised_by_what_bounds_the_row():
    few, many = only(tokens=64, time=200.0), only(tokens=8192, time=2000.0)
    assert (few["bound"], many["bound"]) == ("weights", "flops")
    assert few["normalised_us"] == pytest.approx(200 * 4.39 / 4.45)
    assert many["normalised_us"] == pytest.approx(2000 * 1415 / 1490)
    assert few["normalised_limit_share"] == pytest.approx(few["limit_us"] / few["normalised_us"])
    assert few["limit_share"] == pytest.approx(1 / few["vs_limit"])
    assert annotate([row()], H200, [], KNOWN)[0]["normalised_us"] is None
    assert annotate([few], H200, ANCHORS, KNOWN) == [few], "a second time changes nothing"


def test_counts_below_the_table_aim_at_the_limit_and_40_us():
    one = only(tokens=1)
    assert one["limit_us"] == pytest.approx(6 * 3 * 4096 * 2048 / 4.45e6)
    assert one["aim_us"] == pytest.approx(one["limit_us"] + 40)
    assert one["best_known_us"] is one["must_us"] is None
    assert only(tokens=3)["aim_us"] is None
    assert only(shape="mimo-v2.5", tokens=1)["aim_us"] is None
    assert only(H100, tokens=1)["aim_us"] is None


def test_summary():
    rows = annotate(
        [
            row(tokens=64, time=233.2 / 2),  # far ahead
            row(tokens=256, time=247.6 / 0.5),  # far behind
            row(tokens=512, time=300.0, correct=False),
            row(tokens=8192, time=2990.0),  # must after normalising
            row(tokens=1, time=60.0),
            row(tokens=2, time=500.0),
            row(tokens=3, time=1.0),
        ],
        H200,
        ANCHORS,
        KNOWN,
    )
    measured, normalised = summarise(rows)
    assert (measured["basis"], normalised["basis"]) == ("measured", "normalised")
    assert (measured["rows"], measured["must_met"], measured["aim_rows"], measured["aim_met"]) == (4, 1, 4, 1)
    assert measured["faster"] == pytest.approx((2 * 0.5 * 3089.9 / 2990) ** (1 / 3))
    assert (measured["few_rows"], measured["few_met"]) == (2, 1)
    assert normalised["must_met"] == 2
    assert summarise(annotate([row()], H20, ANCHORS, KNOWN)) == []
    (h100,) = summarise(annotate([row()], H100, ANCHORS, KNOWN))
    assert (h100["basis"], h100["rows"], h100["aim_rows"]) == ("measured", 1, 0)
