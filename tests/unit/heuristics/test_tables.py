"""Measured choices: their files, what `choose` makes of them, and that warmup covers them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from megamoe_jit._bench import tune as _tune
from megamoe_jit._bench.tune_table import table_path
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MAX_TOKENS, MoEShape, Variant
from megamoe_jit.heuristics import all_variants, choose, select
from megamoe_jit.heuristics import tables as tables_module
from megamoe_jit.heuristics.tables import FOLDER, find_gpu, parse_table, table_for, tables

GPU = "NVIDIA Imagined"
SHAPE = MoEShape(4096, 2048, 32, 6)
OTHER = MoEShape(2048, 1024, 32, 4)
RULES = [
    {"tokens": 0, "variant": "cooperative", "lag": 1.0, "rows_per_item": 4},
    {"tokens": 100, "variant": "pingpong", "lag": 4.0, "rows_per_item": 2},
]
DATA = {
    "schema_version": 1,
    "kind": "heuristics",
    "devices": [GPU, "NVIDIA Imagined 2"],
    "measured": {"device": GPU, "date": "2026-01-02T03:04:05+00:00", "commit": "abc"},
    "shapes": [{"name": "x", "hidden": 4096, "intermediate": 2048, "experts": 32, "topk": 6, "rules": RULES}],
}


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (parse_table(DATA),)
    monkeypatch.setattr(tables_module, "tables", lambda: found)
    monkeypatch.setattr(select, "tables", lambda: found)


def test_shipped_tables_are_in_order():
    for path in FOLDER.glob("*.json"):
        data = json.loads(path.read_text())
        assert data["kind"] == "heuristics"
        assert {"device", "driver", "cuda", "nvrtc", "torch", "date", "commit"} <= set(data["measured"])
        assert path == table_path(data["devices"][0])
        parse_table(data)


def test_files_are_read_once_and_a_bad_one_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(DATA))
    assert tables(tmp_path)[0].devices[0] == GPU
    assert tables(tmp_path) is tables(tmp_path)
    shutil.copy(tmp_path / "a.json", tmp_path / "b")
    bad = tmp_path / "bad"
    bad.mkdir()
    for text in ("{", "[]"):
        (bad / "b.json").write_text(text)
        with pytest.raises(ConfigError, match=r"b\.json"):
            tables(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version = 2; allowed: 1"),
        (lambda d: d.pop("shapes"), "not in order: KeyError"),
        (lambda d: d["shapes"][0].pop("topk"), "not in order: KeyError"),
        (lambda d: d["shapes"][0].update(rules=[]), "at least one rule, from 0 or more"),
        (lambda d: d["shapes"][0]["rules"][0].update(tokens=-1), "at least one rule, from 0 or more"),
        (lambda d: d["shapes"][0]["rules"][1].update(tokens=0), "ascend"),
        (lambda d: d["shapes"][0]["rules"][1].update(variant="turbo"), "allowed: pingpong, cooperative"),
        (lambda d: d["shapes"][0]["rules"][1].update(lag=0), "a lag above 0"),
        (lambda d: d["shapes"][0]["rules"][1].update(rows_per_item=3), "rows_per_item of"),
        (lambda d: d["shapes"][0].update(hidden=100), "multiple of 128"),
    ],
)
def test_what_is_not_in_order_is_refused(change, message):
    data = copy.deepcopy(DATA)
    change(data)
    with pytest.raises(ConfigError, match=message):
        parse_table(data)


def test_a_table_is_found_by_the_full_name(imagined):
    assert table_for("NVIDIA Imagined 2") is table_for(GPU) is not None
    assert table_for("NVIDIA Imagined 3") is table_for(None) is None


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, ("cooperative", 132, 4)),
        (99, ("cooperative", 132, 4)),
        (100, ("pingpong", 528, 2)),
        (MAX_TOKENS, ("pingpong", 528, 2)),
    ],
)
def test_measured_rules_are_taken(imagined, tokens, expected):
    choice = choose(SHAPE, tokens, gpu=GPU)
    assert (choice.variant.value, choice.lag_tiles, choice.rows_per_item) == expected
    assert "within 1 % of the best" in choice.reasons[0]
    assert "NVIDIA Imagined (2026-01-02)" in choice.reasons[0]
    assert choose(MoEShape(4096, 2048, 256, 6), tokens, ranks=8, gpu=GPU).variant is choice.variant, "experts per rank"
    assert choose(SHAPE, tokens, num_sms=66, gpu=GPU).lag_tiles == expected[1] // 2


def test_what_the_caller_says_overrules_the_table(imagined):
    assert choose(SHAPE, 1, variant="pingpong", gpu=GPU).variant is Variant.PINGPONG
    assert choose(SHAPE, 1, variant="pingpong", gpu=GPU).lag_tiles == 264, "measured lags belong to measured variants"
    assert choose(SHAPE, 1, variant="cooperative", gpu=GPU).lag_tiles == 132, "as auto, which takes it too"
    for threshold in (50, 256):  # what is the default elsewhere is a choice like any other
        for shape in (SHAPE, OTHER):
            few = choose(shape, 1, cooperative_threshold=threshold, gpu=GPU)
            assert few.variant is Variant.PINGPONG
            assert few.reasons[0].startswith(f"pingpong: 1 token per rank < {threshold}")
            assert choose(shape, 300, cooperative_threshold=threshold, gpu=GPU).variant is Variant.COOPERATIVE


def test_other_gpus_choose_as_ever(imagined):
    for gpu in (None, "NVIDIA H20"):
        for tokens, variant in ((255, Variant.PINGPONG), (256, Variant.COOPERATIVE)):
            choice = choose(SHAPE, tokens, gpu=gpu)
            assert (choice.variant, choice.lag_tiles, choice.rows_per_item) == (variant, 264, 1)


def test_what_nobody_measured_is_left_to_the_threshold(monkeypatch):
    """Other shapes, and of a shape that was measured fewer tokens than the least that were."""
    later = [{**RULES[0], "tokens": 16}, RULES[1]]
    found = (parse_table({**DATA, "shapes": [{**DATA["shapes"][0], "rules": later}]}),)
    monkeypatch.setattr(tables_module, "tables", lambda: found)
    for shape, tokens, variant in ((OTHER, 255, "pingpong"), (OTHER, 256, "cooperative"), (SHAPE, 15, "pingpong")):
        choice, plain = choose(shape, tokens, gpu=GPU), choose(shape, tokens)
        missing = "so few tokens of this shape" if shape is SHAPE else "this shape"
        why = f"nobody measured {missing} on NVIDIA Imagined; {tokens} tokens per rank"
        assert choice.reasons[0].startswith(f"{variant}: {why}")
        assert (choice.variant, choice.lag_tiles, choice.rows_per_item) == (plain.variant, 264, plain.rows_per_item)
    assert "from 16 up to 99 tokens per rank, measured" in choose(SHAPE, 16, gpu=GPU).reasons[0]


def test_an_older_file_with_a_model_is_read_without_it():
    assert parse_table({**DATA, "models": {"pingpong": {"constants": {}, "lag": 0}}}) == parse_table(DATA)


@pytest.mark.parametrize(
    ("rules", "tokens", "where"),
    [
        (RULES[:1], 8192, "at every token count"),
        (RULES, 99, "up to 99 tokens per rank"),
        (RULES, 100, "from 100 tokens per rank on"),
        ([*RULES, {**RULES[0], "tokens": 200}], 8, "up to 99 tokens per rank"),
        ([*RULES, {**RULES[0], "tokens": 200}], 300, "from 200 tokens per rank on"),
        ([*RULES, {**RULES[0], "tokens": 200}], 199, "from 100 up to 199 tokens per rank"),
        ([{**RULES[0], "tokens": 16}], 16, "from 16 tokens per rank on"),
        ([{**RULES[0], "tokens": 1}, {**RULES[1], "tokens": 2}], 1, "from 1 up to 1 token per rank"),
    ],
)
def test_a_rule_says_where_it_holds(monkeypatch, rules, tokens, where):
    found = (parse_table({**DATA, "shapes": [{**DATA["shapes"][0], "rules": rules}]}),)
    monkeypatch.setattr(tables_module, "tables", lambda: found)
    assert (
        f": within 1 % of the best {where}, measured on NVIDIA Imagined (2026-01-02)"
        in choose(SHAPE, tokens, gpu=GPU).reasons[0]
    )


def test_warmup_covers_whatever_a_table_can_pick(imagined):
    for shape in (SHAPE, OTHER):
        picked = {choose(shape, tokens, gpu=gpu).variant for tokens in range(0, 9000, 7) for gpu in (GPU, None)}
        assert picked <= set(all_variants(shape))
    for table in tables():
        for shape, rules in table.rules.items():
            assert {rule.variant for rule in rules} <= set(all_variants(shape))


def test_a_full_name_is_that_gpu_though_another_has_the_same_short_one(monkeypatch):
    """Cards that differ in their memory alone."""
    names = ["NVIDIA Imagined 80GB HBM3", "NVIDIA Imagined 40GB"]
    found = (parse_table({**DATA, "devices": names}),)
    monkeypatch.setattr(tables_module, "tables", lambda: found)
    assert [find_gpu(name) for name in (*names, "nvidia imagined 40gb")] == [*names, names[1]]
    assert find_gpu("imagined") == names[0]


@pytest.mark.parametrize(
    ("tokens", "rows", "says"), [(2047, 1, "8188 token-slots < 8192"), (2048, 8, "8192 token-slots >= 8192")]
)
def test_few_rows_end_below_the_border(tokens, rows, says):
    choice = choose(OTHER, tokens)
    assert choice.rows_per_item == rows
    assert choice.reasons[-1] == f"rows_per_item {rows}: {says}"


GOOD_LINE = {
    "schema_version": 1,
    "kind": "tuning",
    "environment": {},
    "sources": "",
    "name": "x",
    "shape": {},
    "tokens": 1,
    "num_sms": 132,
    "times": [],
}


@pytest.mark.parametrize("missing", sorted({*GOOD_LINE} - {"schema_version", "kind"}))
@pytest.mark.parametrize("after", ["", json.dumps(GOOD_LINE) + "\n"], ids=["last", "not last"])
def test_a_measurement_without_one_of_its_fields_is_refused(tmp_path: Path, missing, after):
    """`condense` would end in a KeyError."""
    path = tmp_path / "t.jsonl"
    line = {name: value for name, value in GOOD_LINE.items() if name != missing}
    path.write_text(json.dumps(line) + "\n" + after)
    with pytest.raises(ConfigError, match=f"{path}, line 1 is no measurement of schema_version 1"):
        _tune.read(path)
    path.write_text(json.dumps(GOOD_LINE) + "\n" + after)
    assert _tune.read(path)[0] == GOOD_LINE


def test_a_binary_file_holds_no_measurements(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="line 1 is no measurement"):
        _tune.read(path)
