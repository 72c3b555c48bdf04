"""The benchmark's bookkeeping, driven on the CPU by a stand-in for the layer and for CUDA's clock."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from megamoe_jit._bench import clock as _timing
from megamoe_jit._bench import conditions as _bench_report
from megamoe_jit._bench import measure as _bench
from megamoe_jit._bench.documents import BaselineRow
from megamoe_jit._bench.grouped_gemm import Dequantised
from megamoe_jit._cli import cli
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.weights import inverse_transform_weights_for_mega_moe_sm90, transform_weights_for_mega_moe_sm90
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FP8, MoEShape, Variant
from megamoe_jit.heuristics.presets import Preset, preset
from megamoe_jit.heuristics.select import Choice
from megamoe_jit.reference import moe_reference

CONDITIONS = {"device": "NVIDIA H200", "driver": "580.1", "nvrtc": "12.9", "commit": "abc"}


class Clock:
    """Stands in for `torch.cuda.Event`: every call between two events takes 100 us."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Clock) -> float:
        return end.at - self.at


class Layer:
    """The package's interface over the reference; adds `error` to every output."""

    transform_weights_for_mega_moe_sm90 = staticmethod(transform_weights_for_mega_moe_sm90)

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.calls: list[tuple[str, int]] = []
        self.capacities: list[int] = []
        self.alive = 0

    def get_symm_buffer_for_mega_moe(self, group, experts, capacity, topk, hidden, intermediate):
        def destroy():
            self.alive -= 1

        self.alive += 1
        self.capacities.append(capacity)
        return SimpleNamespace(
            x=torch.zeros(capacity, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
            x_sf=torch.zeros(capacity, hidden // 128),
            topk_idx=torch.zeros(capacity, topk, dtype=torch.int64),
            topk_weights=torch.zeros(capacity, topk),
            destroy=destroy,
        )

    def __getattr__(self, name):
        def call(y, l1, l2, buffer, *, activation_clamp, fast_math=True):
            assert (activation_clamp, fast_math) == (10.0, True)
            self.calls.append((name, y.shape[0]))
            Clock.now += 0.1
            if y.isnan().all():  # the checked call; timing needs no numbers
                views = (v[: y.shape[0]] for v in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights))
                weights = inverse_transform_weights_for_mega_moe_sm90(l1, l2)
                y.copy_(moe_reference(*views, *weights, activation_clamp=activation_clamp) + self.error)

        if name.startswith("fp8_mega_moe"):
            return call
        raise AttributeError(name)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    layer = Layer()
    monkeypatch.setattr(_bench, "megamoe_jit", layer)
    monkeypatch.setattr(_bench, "require_hopper", lambda: torch.device("cpu"))
    monkeypatch.setattr(_bench, "FLUSH_BYTES", 16)
    monkeypatch.setattr(_timing, "SUSTAINED_S", 0.01)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name in ("synchronize", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None, raising=False)
    monkeypatch.setattr(_timing, "anchors", lambda: {"dense_fp8_8192_tflops": 1300.0, "read_4gib_tb_s": 4.2})
    monkeypatch.setattr(_bench_report, "environment", lambda commit=None: {**CONDITIONS, "commit": commit or "abc"})
    return layer


SMALL = Preset("small", MoEShape(256, 128, 16, 2), ranks=4, source="")


def test_a_case_is_one_gpus_slice():
    case = _bench.cases([preset("v4-flash")], [64])[0]
    assert (case.name, case.shape, case.tokens) == ("v4-flash", MoEShape(4096, 2048, 32, 6), 64)
    assert (case.clamp, case.fast_math) == (10.0, True)


def test_rows(layer: Layer):
    seen: list[_bench.Row] = []
    rows = _bench.measure(_bench.cases([SMALL], [5, 300]), progress=seen.append)
    assert rows == seen
    forced = [(variant.value, variant.value) for variant in Variant.reading(FP8)]
    assert [(r.tokens, r.variant, r.kernel) for r in rows] == [
        (tokens, *kind)
        for tokens, automatic in ((5, "pingpong"), (300, "cooperative"))
        for kind in (("auto", automatic), *forced)
    ]
    assert {row.weights for row in rows} == {"fp8"}
    for row in rows:
        assert row.correct
        assert row.median_us == pytest.approx(100)
        assert row.sustained_us == pytest.approx(100)
        assert row.staged_us == pytest.approx(100)
        assert row.experts == 4
        assert row.tflops == pytest.approx(6 * row.tokens * 2 * 256 * 128 / 100e-6 * 1e-12)
    assert rows[-1].weights_tb_s == pytest.approx(4 * 3 * 256 * 128 / 100e-6 * 1e-12)
    assert (layer.capacities, layer.alive) == ([300], 0)
    timed = [name for name, tokens in layer.calls if tokens == 5]
    turn = ["fp8_mega_moe", *(f"fp8_mega_moe_{variant}" for variant, _ in forced)]
    timed = timed[len(turn) :][: 2 * len(turn) * (_timing.WARMUP + _timing.TIMED)]
    assert timed == [*turn, *turn] * 18, "they take turns, first without and then with the staging"


def test_a_wrong_output_is_seen_and_fails_the_command(layer: Layer, tmp_path: Path):
    layer.error = 0.5
    (tmp_path / "s.toml").write_text("[s]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 2\n")
    arguments = ["bench", "--shapes", str(tmp_path / "s.toml"), "--tokens", "7", "--variant", "auto"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "1 of 1 rows differ" in result.stderr


def test_command_writes_documents(layer: Layer, tmp_path: Path):
    (tmp_path / "s.toml").write_text("[s]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 2\n")
    arguments = ["bench", "--shapes", str(tmp_path / "s.toml"), "--tokens", "7,20", "--variant", "pingpong"]
    result = CliRunner().invoke(cli, [*arguments, "--json", "--output", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    assert doc == json.loads((tmp_path / "rows.json").read_text())
    assert (doc["kind"], doc["environment"], len(doc["anchors"])) == ("bench", CONDITIONS, 2)
    assert [row["tokens"] for row in doc["rows"]] == [7, 20]
    result = CliRunner().invoke(cli, [*arguments, "--output", str(tmp_path / "rows.csv")])
    assert result.exit_code == 0, result.output
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["tokens"], row["device"], row["commit"]) for row in rows] == [
        ("7", "NVIDIA H200", "abc"),
        ("20", "NVIDIA H200", "abc"),
    ]
    assert "card before: dense FP8 8192^3 1300 TFLOPS" in result.stdout


def test_a_summary_is_printed_and_the_card_is_measured_between_shapes(layer: Layer, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text(f"[{name}]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 2\n")
    shapes = f"{tmp_path / 'one.toml'},{tmp_path / 'two.toml'}"
    result = CliRunner().invoke(cli, ["bench", "--shapes", shapes, "--tokens", "7"])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("card")] == [
        "card before",
        "card between",
        "card after",
    ]
    assert (
        "automatic choice: within 3 % of the best variant on 2 of 2 rows, worst 1.000 times its time" in result.stdout
    )


def test_the_unfused_layer_takes_turns(layer: Layer, monkeypatch: pytest.MonkeyPatch):
    """Traced as on a GPU, but not compiled for a CPU, which takes 20 s and shows nothing more."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    others: list[BaselineRow] = []
    not_timed = {"DeepGEMM grouped, block scales": "deep_gemm is not installed", Dequantised.name: ""}
    rows = _bench.measure(_bench.cases([SMALL], [5]), ["auto"], not_timed=not_timed, baselines=others)
    (other,) = others
    assert (other.method, other.ranks, other.experts, other.tokens) == (Dequantised.name, 1, 4, 5)
    assert (other.graph, other.compiled, other.correct, other.reason) == (False, True, True, "")
    assert other.median_us == pytest.approx(0), "the stand-in's clock moves in calls of the layer alone"
    assert rows[0].baseline is None, "a time of nothing is no time"


def test_only_the_later_half_of_a_burst_counts(monkeypatch: pytest.MonkeyPatch):
    """Its median: the clock of the GPU has come down by then."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pairs = [(SimpleNamespace(elapsed_time=lambda _, ms=ms: ms), None) for ms in (9.0, 9.0, 9.0, 0.1, 0.3, 0.2)]
    assert _timing.second_half(pairs) == pytest.approx(200)


def test_default_cases():
    work = _bench.default_cases(map(preset, ("v4-flash", "mimo-v2.5")))
    assert [case.tokens for case in work if case.name == "v4-flash"] == [1, 2, 4, 8, 16, 32, *_bench.DEFAULT_TOKENS[1:]]
    assert tuple(case.tokens for case in work if case.name == "mimo-v2.5") == _bench.DEFAULT_TOKENS


def test_plots_are_drawn_and_equal_documents_give_equal_files(layer: Layer, tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / "s.toml").write_text("[s]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 2\n")
    arguments = ["bench", "--shapes", str(tmp_path / "s.toml"), "--tokens", "7,20"]
    for folder in ("one", "two"):
        result = CliRunner().invoke(cli, [*arguments, "--plot", str(tmp_path / folder)])
        assert result.exit_code == 0, result.output
        assert f"drawn: {tmp_path / folder / 'limit.svg'}" in result.stderr
    for name in ("time.svg", "limit.svg"):
        text = (tmp_path / "one" / name).read_text()
        assert "NVIDIA H200, driver 580.1, NVRTC 12.9, abc" in text
        assert text == (tmp_path / "two" / name).read_text()


def test_other_endings_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\.json or \.csv"):
        _bench_report.write({"rows": []}, tmp_path / "rows.txt")


def test_what_is_no_number_becomes_null(tmp_path: Path):
    _bench_report.write({"rows": [{"diff": float("nan")}]}, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": [{"diff": None}]}


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_demo_on_a_gpu(layer: Layer, monkeypatch: pytest.MonkeyPatch, error: float):
    layer.error = error
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("megamoe_jit._cli.demo.TOKENS", (16, 256))
    monkeypatch.setattr("megamoe_jit._jit.runtime.warmup", lambda specs, **_: [])
    monkeypatch.setattr("megamoe_jit.heuristics.presets.preset", lambda name: SMALL)
    result = CliRunner().invoke(cli, ["demo", "--json"])
    assert result.exit_code == (1 if error else 0), result.output
    doc = json.loads(result.stdout)
    assert (doc["device"], doc["passed"]) == ("NVIDIA H200", not error)
    assert [(row["tokens"], row["correct"]) for row in doc["rows"]] == [(t, not error) for t in (16, 256)]
    assert CliRunner().invoke(cli, ["demo"]).stdout.count("NO") == (2 if error else 0)


def test_the_kernel_that_is_named_is_the_one_that_the_device_takes(monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, object]] = []

    def choose(*_: object, **named: object) -> Choice:
        asked.append(named)
        return Choice(Variant.PINGPONG, (), 1, 1)

    monkeypatch.setattr(_bench, "choose", choose)
    monkeypatch.setattr(_bench, "sm_count", lambda _: 78)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H20")
    shape = MoEShape(256, 128, 4, 2)
    assert _bench.kernel_of(shape, 5, "auto", torch.device("cuda", 0), 2) == "pingpong"
    with override(variant="cooperative", cooperative_threshold=7):
        _bench.kernel_of(shape, 5, "auto", torch.device("cpu"))
    common = {"weights": FP8}
    assert asked == [
        {"ranks": 2, "variant": "auto", "cooperative_threshold": None, "gpu": "NVIDIA H20", "num_sms": 78, **common},
        {"ranks": 1, "variant": "cooperative", "cooperative_threshold": 7, **common},
    ]
