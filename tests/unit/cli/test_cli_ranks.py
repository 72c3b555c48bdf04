"""`bench --ranks` and `verify --ranks`: what the commands make of what the ranks found."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from megamoe_jit._bench import measure as _bench
from megamoe_jit._bench import measure_ranks as _bench_ranks
from megamoe_jit._check import verify_ranks as _verify_ranks
from megamoe_jit._check.documents import Outcome
from megamoe_jit._cli import cli
from megamoe_jit._cli._options import rank_count
from megamoe_jit._jit import runtime as _runtime
from tests.commandline import checked
from tests.unit.bench.test_unfused import merge, part


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_runtime, "warmup", lambda *_, **__: [])  # see test_verify_warmup.py


def found(wrong=False):
    merged = merge([part(1), part(2, wrong)])
    return {
        "environment": {"device": "NVIDIA H200", "ranks": 2},
        "anchors": [{"dense_fp8_8192_tflops": 1500.0, "read_4gib_tb_s": 4.4}] * 2,
        "rows": merged["rows"],
        "baselines": merged["baselines"],
        "baselines_not_timed": {"another": "no such operator"},
    }


def bench(*more, code=0):
    done = CliRunner().invoke(cli, ["bench", "--shapes", "v4-flash", "--tokens", "64", *more])
    assert done.exit_code == code, done.output
    return done.stdout


def test_bench_over_ranks_prints_tables_and_a_document(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(_bench_ranks, "run", lambda *args, **named: asked.append((args, named)) or found())
    text = bench("--ranks", "2", "--variant", "auto")
    assert "ONE RANK us" in text
    assert "x ONE RANK" in text
    assert "104.0" in text
    assert "not timed: another (no such operator)" in text
    assert "card before: dense FP8 8192^3 1500 TFLOPS" in text
    (args, named) = asked[0]
    assert args[1:] == ((64,), ("auto",), 2)
    assert named["baseline"] is True
    doc = checked(bench("--ranks", "2", "--no-baseline", "--json", "--output", str(tmp_path / "rows.json")))
    assert asked[1][1]["baseline"] is False
    assert doc["rows"][0]["vs_one_rank"] == 2.2
    assert doc["rows"][0]["limit_us"] > 100
    assert (doc["rows"][0]["best_known_us"], doc["summary"]) == (None, [])
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == doc["rows"]
    bench("--ranks", "2", "--output", str(tmp_path / "rows.csv"))
    assert "rank_medians_us" in (tmp_path / "rows.csv").read_text().splitlines()[0]


def test_a_wrong_row_fails_the_command(monkeypatch):
    monkeypatch.setattr(_bench_ranks, "run", lambda *_, **__: found(wrong=True))
    assert "WRONG" in bench("--ranks", "2", code=1)


def test_verify_over_ranks(monkeypatch):
    outcomes = [
        Outcome("L1.smoke", "auto", 1e-5, 1e-4, True, True, ""),
        Outcome("L1.b", "auto", 1, 1, True, False, "x"),
    ]
    monkeypatch.setattr(_bench, "require_hopper", lambda: None)
    monkeypatch.setattr(_verify_ranks, "run_ranks", lambda ranks, *_, **__: outcomes[: ranks - 1])
    words = ["verify", "--filter", "L1.smoke", "--variant", "auto", "--json"]
    done = CliRunner().invoke(cli, [*words, "--ranks", "2"])
    assert done.exit_code == 0, done.output
    assert checked(done.stdout)["run"] == 1
    monkeypatch.setattr(_verify_ranks, "run_ranks", lambda ranks, *_, **__: outcomes)
    failing = CliRunner().invoke(cli, [*words, "--ranks", "2"])
    assert failing.exit_code == 1
    assert failing.stderr.splitlines()[-3:-1] == ["failed:", "  L1.b  auto: x"]
    assert CliRunner().invoke(cli, [*words, "--ranks", "3"]).exit_code == 2  # 8 experts, 3 ranks
    listed = CliRunner().invoke(cli, ["verify", "--list", "--ranks", "3"])
    assert "L1.smoke" not in listed.output
    assert "shape.h640_i384_e33_k3" in listed.output


def test_verify_over_ranks_ends_with_one_table(monkeypatch):
    outcomes = [
        Outcome("L1.smoke", "pingpong", 1e-5, 1e-4, True, True, ""),
        Outcome("L1.smoke", "cooperative", math.nan, math.nan, True, False, "round 2: rank 1: lost"),
        Outcome("route.hot.t96", "pingpong", 3e-5, 2e-4, True, True, ""),
    ]
    asked = []
    monkeypatch.setattr(_bench, "require_hopper", lambda: None)
    monkeypatch.setattr(_verify_ranks, "run_ranks", lambda _, runs, *__: asked.append(runs) or outcomes)
    words = ["verify", "--filter", "L1.smoke,route.hot.t96", "--ranks", "2", "--rounds", "3", "--skew", "500"]
    words += ["--variant", "pingpong", "--variant", "cooperative"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1
    assert [(runs.rounds, runs.skew_us) for runs in asked] == [(3, 500)]
    head, *table = done.stdout.splitlines()
    assert head == "2 ranks, 3 rounds of each scenario and variant, each up to 500 us late for each launch"
    assert [line.split() for line in table] == [
        ["FAMILY", "SCENARIOS", "RUN", "PASSED", "FAILED", "WORST", "DIFF", "WORST", "ROW"],
        ["L1", "1", "2", "1", "1", "1.0e-05", "1.0e-04"],
        ["route", "1", "1", "1", "0", "3.0e-05", "2.0e-04"],
        ["all", "2", "3", "2", "1", "3.0e-05", "2.0e-04"],
    ]
    assert "  L1.smoke  cooperative: round 2: rank 1: lost" in done.stderr
    doc = checked(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert (doc["rounds"], doc["skew_us"], doc["run"], doc["not_run"]) == (3, 500, 3, 1)


@pytest.mark.parametrize("option", [("--rounds", "2"), ("--skew", "1")])
def test_rounds_and_skew_are_about_several_ranks(monkeypatch, option):
    monkeypatch.setattr(_bench, "require_hopper", lambda: None)
    done = CliRunner().invoke(cli, ["verify", "--list", *option])
    assert done.exit_code == 2
    assert "give --ranks 2 or more with them" in done.stderr


def test_other_ranks_of_torchrun_say_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(_bench, "require_hopper", lambda: None)
    monkeypatch.setattr(_bench_ranks, "run", lambda *_, **__: None)
    monkeypatch.setattr(_verify_ranks, "run_ranks", lambda *_, **__: None)
    assert bench("--json") == ""
    assert CliRunner().invoke(cli, ["verify", "--filter", "L1.smoke", "--json"]).stdout == ""
    assert rank_count(None) == 2
    assert rank_count(4) == 4
