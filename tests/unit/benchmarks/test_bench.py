"""`python -m benchmarks bench` and `tune`: what the package measures, with the commit and beside other kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as lab
from benchmarks import checkout, goals
from megamoe_jit._bench import measure as _bench
from megamoe_jit._bench import measure_ranks as _bench_ranks
from megamoe_jit._bench import tune as _tune
from megamoe_jit._cli import bench as own_bench
from megamoe_jit._version import __version__
from tests.commandline import checked
from tests.unit.bench.test_measure import CONDITIONS, Layer, layer  # noqa: F401 - a fixture
from tests.unit.cli.test_cli_ranks import found


@pytest.fixture(autouse=True)
def at_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "commit", lambda: "0123456789ab")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def bench(*words: str, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(lab.main, ["bench", *words])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch, layer: Layer) -> None:  # noqa: F811
    """v4-flash at 64 tokens, measured by a stand-in: far ahead of what is known."""
    times, unfused = (150.0, 150.0, 150.0, 150.0, 150.0), (None, None, None)
    sizes = ("v4-flash", 4096, 2048, 32, 6, 64)
    row = _bench.Row(*sizes, "auto", "pingpong", "fp8", *times, 0.0, 0.0, True, 1.0, 1.0, *unfused)
    monkeypatch.setattr(_bench, "measure", lambda *_, **__: [row])


@pytest.mark.usefixtures("one_row")
def test_rows_are_held_against_other_kernels(tmp_path: Path):
    words = ("--shapes", "v4-flash", "--tokens", "64", "--variant", "auto", "--output", str(tmp_path / "rows.json"))
    text, talk = bench(*words)
    head, cells = (re.split(r"  +", line) for line in text.splitlines()[:2])
    shown = dict(zip(head, cells, strict=True))
    assert (shown["REACHES"], shown["x BEST KNOWN"], shown["% OF LIMIT"]) == ("aim", "0.64", "121")
    assert shown["NORMALISED"] == f"{150 * 4.2 / 4.45:.1f}"
    assert (
        "auto, measured: 1.555 times as fast as the best known (geometric mean of 1), must 1 of 1, aim 1 of 1" in text
    )
    assert "auto, normalised: 1.6" in text
    assert f"NVRTC {CONDITIONS['nvrtc']}, 0123456789ab" in talk
    doc = checked(bench(*words, "--json")[0])
    assert doc == json.loads((tmp_path / "rows.json").read_text())
    assert (doc["environment"]["commit"], doc["rows"][0]["best_known_us"]) == ("0123456789ab", 233.2)
    assert [part["basis"] for part in doc["summary"]] == ["measured", "normalised"]
    bench(*words[:-1], str(tmp_path / "rows.csv"))
    assert "best_known_us" in (tmp_path / "rows.csv").read_text().splitlines()[0]


@pytest.mark.usefixtures("one_row")
def test_plots_have_the_best_known_and_the_aim(tmp_path: Path):
    pytest.importorskip("matplotlib")
    bench("--shapes", "v4-flash", "--tokens", "64", "--variant", "auto", "--plot", str(tmp_path))
    times, shares = ((tmp_path / name).read_text() for name in ("time.svg", "limit.svg"))
    assert ">best known<" in times
    assert ">aim<" in times
    assert ">best known kernel<" in shares


def test_several_ranks_have_a_summary_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_bench_ranks, "run", lambda *_, **__: found())
    text, _ = bench("--shapes", "v4-flash", "--tokens", "64", "--ranks", "2")
    assert "ONE RANK us" in text
    assert "auto, measured:" in text
    monkeypatch.setattr(_bench_ranks, "run", lambda *_, **__: found(wrong=True))
    out, _ = bench("--shapes", "v4-flash", "--tokens", "64", "--ranks", "2", "--json", code=1)
    doc = checked(out)
    assert (doc["environment"]["commit"], doc["rows"][0]["best_known_us"]) == ("0123456789ab", 233.2)
    monkeypatch.setattr(_bench_ranks, "run", lambda *_, **__: None)
    assert bench("--ranks", "2") == ("", ""), "another rank of torchrun reports"


def test_a_wrong_row_reaches_nothing():
    def reached(correct: bool, must_us: float | None, aim_us: float | None) -> str:
        row = SimpleNamespace(correct=correct, median_us=1.0, must_us=must_us, aim_us=aim_us)
        return lab.COLUMNS["REACHES"](row)

    assert reached(False, 2.0, 2.0) == "WRONG"
    assert reached(True, 2.0, 2.0) == "aim"
    assert reached(True, 2.0, 0.5) == "must"
    assert reached(True, None, None) == "-"


def test_nothing_known_is_no_summary():
    assert lab.summary_lines([]) == []


def test_options_and_refusals_are_those_of_the_package(tmp_path: Path):
    assert lab.main.commands["bench"].params is own_bench.bench.params
    assert "must end in .json or .csv" in bench("--output", "rows.txt", code=2)[1]
    assert "allowed: " in bench("--shapes", "v4-flush", code=2)[1]
    assert "--nodes is for megamoe-jit bench" in bench("--nodes", "2", code=2)[1]


def test_the_command_lines_of_the_readme_parse():
    text = (checkout.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python -m benchmarks (\w+) (.*?)  +#", text, re.MULTILINE)
    assert {name for name, _ in lines} == {"bench", "tune"}
    for name, words in lines:
        with lab.main.commands[name].make_context(name, words.split()):
            pass
    for module in re.findall(r"^python -m benchmarks\.(\w+)", text, re.MULTILINE):
        assert importlib.util.find_spec(f"benchmarks.{module}"), module


def test_the_tuner_writes_the_commit_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(_tune, "tune", lambda *_, **named: asked.append(named) or [])
    done = CliRunner().invoke(lab.main, ["tune", "--data", str(tmp_path / "t.jsonl"), "--lags", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert checked(done.stdout)["cells"] == []
    assert (asked[0]["commit"], asked[0]["lags"]) == ("0123456789ab", (1.0,))


def test_the_targets_below_the_table_are_what_is_timed_there():
    few = goals.load().few
    assert (tuple(few["shapes"]), tuple(few["tokens"])) == (_bench.FEW_SHAPES, _bench.FEW_TOKENS)


def git(folder: Path, *words: str) -> str:
    """Run git with an identity of its own and no settings of the user's."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    own |= {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", *words], cwd=folder, env={**os.environ, **own}, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_measurement_names_the_commit_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert checkout.commit() == f"v{__version__}", "no checkout"
    git(tmp_path, "init", "--quiet")
    assert checkout.commit() == f"v{__version__}", "nothing committed"
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert checkout.commit() == head[:12]
    (tmp_path / "changed").touch()
    assert checkout.commit() == f"{head[:12]}-dirty"
    git(tmp_path, "add", "changed")
    git(tmp_path, "commit", "--quiet", "-m", "second")
    assert checkout.commit() == git(tmp_path, "rev-parse", "HEAD")[:12] != head[:12]
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.setattr(checkout, "ROOT", inside)
    assert checkout.commit() == f"v{__version__}", "not that of a repository around it"
