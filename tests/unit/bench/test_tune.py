"""The tuner: what it measures and skips, and the table that comes of it; on stand-ins for the layer and the clock."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from megamoe_jit._bench import measure as _bench
from megamoe_jit._bench import tune as _tune
from megamoe_jit._bench import tune_table as _tune_table
from megamoe_jit._cli import cli
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.bound_kernel import CallPlan
from megamoe_jit._spec import FP8, MoEShape, Variant
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit.heuristics import choose
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.heuristics.tables import parse_table
from tests.commandline import checked
from tests.unit.bench.test_measure import Clock, Layer

DEVICE = "NVIDIA H200"
SMALL = Preset("small", MoEShape(256, 128, 16, 2), ranks=4, source="")
SIZES = {"hidden": 256, "intermediate": 128, "experts": 4, "topk": 2}


class Tuned(Layer):
    """A layer whose calls take longer the larger the lag is, and of whose variants the tokens decide."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: set[str] = set()
        self.launched: list[tuple[str, int, int]] = []

    def get_symm_buffer_for_mega_moe(self, group, experts, capacity, topk, hidden, intermediate):
        buffer = super().get_symm_buffer_for_mega_moe(group, experts, capacity, topk, hidden, intermediate)
        shape = MoEShape(hidden, intermediate, experts, topk)

        def plan(tokens, variant, fast_math, num_sms, inputs=Inputs.STAGED, weights=FP8):
            return CallPlan(None, choose(shape, tokens, variant=variant), 132, 1, False)

        def launch(plan, *, y, tokens, l1, l2, stats, clamp, raw=None, shared_weight=1.0):
            variant, before = plan.choice.variant.value, Clock.now
            self.launched.append((variant, plan.choice.lag_tiles, plan.choice.rows_per_item))
            self.fp8_mega_moe(y, l1, l2, buffer, activation_clamp=clamp, fast_math=True)
            if variant in self.wrong:
                y += 1
            good = (variant == "pingpong") == (tokens < 10)
            Clock.now = (
                before + (0.1 if good else 0.2) + plan.choice.lag_tiles * 1e-5 + plan.choice.rows_per_item * 1e-8
            )

        buffer.plan, buffer.launch = plan, launch
        return buffer


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Tuned:
    layer = Tuned()
    monkeypatch.setattr(_bench, "megamoe_jit", layer)
    for module in (_bench, _tune):
        monkeypatch.setattr(module, "require_hopper", lambda: torch.device("cpu"))
        monkeypatch.setattr(module, "FLUSH_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name in ("synchronize", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None, raising=False)
    conditions = {"device": DEVICE, "sms": 132, "driver": "580.1", "nvrtc": "12.9", "cuda": "12.9", "torch": "2.9"}
    monkeypatch.setattr(_tune, "environment", lambda commit: {**conditions, "date": "2026-01-02", "commit": commit})
    return layer


def test_every_contender_is_checked_and_timed_in_turn(layer: Tuned, tmp_path: Path):
    (cell,) = _tune.tune([SMALL], tmp_path / "t.jsonl", [5], lags=[1, 2], rows_per_item=[1, 8])
    assert (cell["shape"], cell["tokens"], cell["num_sms"], cell["name"]) == (SIZES, 5, 132, "small")
    ways = [(t["variant"], t["lag"], t["rows_per_item"]) for t in cell["times"]]
    assert ways == [(v.value, lag, rows) for v in Variant.reading(FP8) for lag in (1.0, 2.0) for rows in (1, 8)]
    assert all(t["correct"] and t["diff"] is not None for t in cell["times"])
    assert cell["times"][0]["median_us"] == pytest.approx(101.32, abs=0.01)
    turn = [(v.value, lag, rows) for v in Variant.reading(FP8) for lag in (132, 264) for rows in (1, 8)]
    assert layer.launched == turn * 19, "checked once, then 18 rounds"
    assert layer.alive == 0
    assert json.loads((tmp_path / "t.jsonl").read_text()) == cell


def test_a_later_run_goes_on(layer: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "t.jsonl", []

    def go(tokens, **more):
        seen.clear()
        options = {"lags": [1], "rows_per_item": [1], **more}
        _tune.tune([SMALL], path, tokens, progress=lambda cell, now: seen.append((cell["tokens"], now)), **options)
        return seen

    assert go([5]) == [(5, True)]
    assert go([5, 20]) == [(5, False), (20, True)]
    with path.open("a") as file:
        file.write('{"schema_version": 1, "kind": "tun')  # interrupted
    assert go([20, 40]) == [(20, False), (40, True)]
    assert go([5], lags=[1, 2]) == [(5, True)], "a contender more"
    assert go([5]) == [(5, False)], "a contender less"
    assert go([5], force=True) == [(5, True)]
    assert len(_tune.read(path)) == 5
    monkeypatch.setattr(_tune, "sources", lambda shape: "other")
    assert go([5]) == [(5, True)], "other kernels"


def test_lines_that_are_something_else_are_refused(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    assert _tune.read(path) == []
    path.write_text('{"kind": "bench"}\n{}\n')
    with pytest.raises(ConfigError, match="line 1 is no measurement"):
        _tune.read(path)
    with pytest.raises(ConfigError, match="lags: 0 is not supported; allowed: above 0, up to 64"):
        _tune.tune([SMALL], path, [1], lags=[0])
    with pytest.raises(ConfigError, match="rows: 3 is not supported; allowed: 1, 2, 4, 8"):
        _tune.tune([SMALL], path, [1], rows_per_item=[3])


def test_sources_depend_on_the_shape_alone():
    one, two = MoEShape(256, 128, 4, 2), MoEShape(256, 128, 8, 2)
    assert _tune.sources(one) == _tune.sources(one) != _tune.sources(two)


def test_command(layer: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "s.toml").write_text("[s]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 2\n")
    data, table = tmp_path / "t.jsonl", tmp_path / "tables" / "h200.json"
    words = ["tune", "--shapes", str(tmp_path / "s.toml"), "--tokens", "2,5,20,80", "--rows", "1", "--lags", "1,2.5"]
    result = CliRunner().invoke(cli, [*words, "--data", str(data), "--write-table", "--table", str(table), "--json"])
    assert result.exit_code == 0, result.output
    doc = checked(result.stdout)
    assert (doc["measured"], doc["wrong"], doc["table"]) == (4, 0, str(table))
    rules = json.loads(table.read_text())["shapes"][0]["rules"]
    assert [(r["tokens"], r["variant"], r["lag"]) for r in rules] == [(2, "pingpong", 1.0), (10, "cooperative", 1.0)]
    assert parse_table(json.loads(table.read_text())).devices == (DEVICE,)
    result = CliRunner().invoke(cli, [*words, "--data", str(data)])
    assert "pingpong, lag 1, rows 1" in result.stdout
    assert "(measured before)" in result.stderr
    layer.wrong = {"pingpong"}
    result = CliRunner().invoke(cli, [*words, "--data", str(data), "--force"])
    assert result.exit_code == 1
    assert "8 outputs differ from the reference" in result.stderr
    monkeypatch.setattr(_tune, "require_hopper", lambda: 1 / 0)
    result = CliRunner().invoke(cli, ["tune", "--no-measure", "--data", str(data), "--json"])
    assert len(checked(result.stdout)["cells"]) == 8
    for wrong in (["--tokens", "0"], ["--lags", "x"], ["--rows", "1.5"]):
        assert CliRunner().invoke(cli, ["tune", *wrong]).exit_code == 2


def cell(tokens, times, device=DEVICE, **more):
    made = [
        {"variant": v, "lag": lag, "rows_per_item": rows, "median_us": us, "correct": us > 0}
        for (v, lag, rows), us in times.items()
    ]
    env = {"device": device, "date": f"2026-01-{tokens % 28 + 1:02}"}
    return {"environment": env, "name": "s", "shape": SIZES, "tokens": tokens, "num_sms": 132, "times": made, **more}


P1, P2, C1 = ("pingpong", 1.0, 1), ("pingpong", 2.0, 1), ("cooperative", 1.0, 1)


def test_noise_makes_no_border():
    cells = [
        cell(16, {P1: 100.0, P2: 100.5, C1: 120.0}),
        cell(64, {P1: 100.9, P2: 100.0, C1: 110.0}),
        cell(100, {P1: 102.0, P2: 100.0, C1: 110.0}),
        cell(400, {P1: 150.0, P2: 150.0, C1: 100.0}),
    ]
    table = _tune_table.condense([cell(16, {P1: 1.0}), *cells])
    assert table["shapes"][0]["rules"] == [
        {"tokens": 16, "variant": "pingpong", "lag": 2.0, "rows_per_item": 1},
        {"tokens": 200, "variant": "cooperative", "lag": 1.0, "rows_per_item": 1},
    ]
    assert table["measured"]["date"] == "2026-01-17"
    parse_table(table)


def test_wrong_outputs_are_no_choice():
    assert _tune_table.condense([cell(16, {P1: -1.0, C1: 5.0})])["shapes"][0]["rules"][0]["variant"] == "cooperative"
    with pytest.raises(ConfigError, match="no contender gave the right answer for s, 16 tokens"):
        _tune_table.condense([cell(16, {P1: -1.0})])


def test_a_table_is_of_one_gpu(tmp_path: Path):
    with pytest.raises(ConfigError, match="of 2 GPUs"):
        _tune_table.condense([cell(16, {P1: 1.0}), cell(32, {P1: 1.0}, device="NVIDIA H20")])
    with pytest.raises(ConfigError, match="of 0 GPUs"):
        _tune_table.condense([])
    assert _tune_table.write_table([cell(16, {P1: 1.0})], tmp_path / "x.json").is_file()


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H20", "h20"),
    ],
)
def test_tables_have_short_names(device, name):
    assert _tune_table.table_path(device, Path("x")) == Path("x") / f"{name}.json"


def test_stand_ins_are_like_the_buffer():
    from megamoe_jit._layer.buffer import SymmBuffer

    buffer = Tuned().get_symm_buffer_for_mega_moe(None, 4, 8, 2, 256, 128)
    assert isinstance(buffer, SimpleNamespace)
    for name in ("plan", "launch"):
        real, stand_in = getattr(SymmBuffer, name).__code__, getattr(buffer, name).__code__
        assert (
            real.co_varnames[1 : real.co_argcount + real.co_kwonlyargcount]
            == stand_in.co_varnames[: stand_in.co_argcount + stand_in.co_kwonlyargcount]
        )


def test_a_file_that_is_no_measurement_keeps_its_last_line(tmp_path: Path):
    path = tmp_path / "notes"
    for text in ("my only notes", "[]\n", '{"kind": "other"}\n', "\xff\xfe"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match="line 1 is no measurement"):
            _tune.read(path)
        assert path.read_text(encoding="latin-1") == text
    for begun in ('{"sch', '{"schema_version": 1, "kind": "tun'):
        path.write_text(begun)
        assert _tune.read(path) == []
        _tune._end_last_line(path)
        assert path.read_text() == ""
