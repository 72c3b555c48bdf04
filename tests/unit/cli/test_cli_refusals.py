"""What the operating system or a setting refuses: said in one line, and before long work rather than after it."""

from __future__ import annotations

import errno
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from megamoe_jit._bench import conditions as _bench_report
from megamoe_jit._bench import measure as _bench
from megamoe_jit._bench import measure_ranks as _bench_ranks
from megamoe_jit._bench import tune as _tune
from megamoe_jit._bench import tune_table as _tune_table
from megamoe_jit._cli import cli
from megamoe_jit._cli._io import must_be_writable
from megamoe_jit._diagnose.explain import kernel_state
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit.heuristics.tables import FOLDER
from tests.commandline import SIZES, STAGED, checked, run, warm_cache
from tests.unit.cli.test_cli_ranks import found

ROOT = Path(__file__).resolve().parents[3]

#: The command line, by a user to whom permissions apply: root keeps its files, but not its way past them.
ORDINARY = """
import ctypes, os, sys
if os.geteuid() == 0:
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
from megamoe_jit._cli import main
main()
"""


def invoke(*words: str):
    return CliRunner().invoke(cli, list(words))


def ordinary(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ORDINARY, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environ},
        cwd=ROOT,
    )


@pytest.fixture
def closed(tmp_path: Path):
    """A cache in a directory that may not be entered, as one of another user may not."""
    folder = tmp_path / "closed"
    warm_cache(folder / "cache")
    folder.chmod(0)
    yield folder / "cache"
    folder.chmod(0o700)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["warmup", *STAGED, "--json"], 1, "to a folder of your own"),
        (["warmup", *STAGED, "--dry-run", "--json"], 0, "0 cached, 2 missing"),
        (["explain", *SIZES, "--tokens", "8", "--json"], 0, ""),
    ],
    ids=["warmup", "dry run", "explain"],
)
def test_a_cache_that_may_not_be_entered_costs_a_warning(closed: Path, words: list[str], code: int, says: str):
    done = ordinary(*words, MEGAMOE_JIT_CACHE_DIR=str(closed))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("cannot read kernel cache") == 1
    assert says in done.stderr
    doc = checked(done.stdout)
    assert not any(each.get("cached") or each.get("stored") for each in doc.get("kernels", doc.get("calls")))


def test_a_cache_that_calls_do_not_trust_has_nothing_for_explain(tmp_path: Path):
    spec = KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG)
    root = warm_cache(tmp_path / "cache")
    with override(cache_dir=root):
        assert kernel_state(spec).cached is True
        (root / "v1").chmod(0o777)
        assert kernel_state(spec).cached is False


@pytest.mark.parametrize("words", ["render v4-flash/pingpong", "env --json", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output(words: str, unbuffered: str):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megamoe_jit", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_a_full_disk_behind_both_streams():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megamoe_jit", "render", "v4-flash/pingpong"]
        assert subprocess.run(command, stdout=full, stderr=full, timeout=60).returncode == 1


def without(number: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, one of whose streams was closed before it began."""
    command = ["sh", "-c", f'exec "$@" {number}>&-', "sh", sys.executable, "-m", "megamoe_jit", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "words", ["render v4-flash/pingpong", "env --json", "cache ls --json", "--help", "completion zsh"]
)
def test_a_closed_standard_output(words: str):
    done = without(1, *words.split())
    assert (done.returncode, done.stderr) == (1, "Error: standard output is closed\n")


def test_a_closed_standard_output_that_nothing_is_written_to(tmp_path: Path):
    done = without(1, "cache", "clear", "--cache-dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, f"removed 0 kernels, 0 B, from {tmp_path}\n")
    assert without(1, "cache", "rm").returncode == 2


def test_a_closed_standard_error(tmp_path: Path):
    done = without(2, "cache", "path", "--cache-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n")
    with open("/dev/full", "w") as full:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "megamoe_jit", "cache", "path"]
        assert subprocess.run(command, stdout=full, timeout=60).returncode == 1


def test_a_refused_file_is_named(tmp_path: Path):
    (tmp_path / "data.jsonl").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tune, "read", lambda path: path.joinpath("below").read_text())
        result = invoke("tune", "--no-measure", "--data", str(tmp_path / "data.jsonl"))
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path / 'data.jsonl' / 'below'}: Not a directory\n"


def test_what_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "file", tmp_path / "new", Path("new"), tmp_path):
        must_be_writable(path, "--output")
    must_be_writable(tmp_path / "a" / "b" / "new", "--table", in_new_folders=True)
    for path, more, reason in (
        (tmp_path / "a" / "new", {}, f"{tmp_path / 'a'} does not exist"),
        (tmp_path / "file" / "new", {}, "is not a directory"),
        (tmp_path / "file" / "a" / "new", {"in_new_folders": True}, "is not a directory"),
    ):
        with pytest.raises(Exception, match=reason):
            must_be_writable(path, "--output", **more)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path in (tmp_path / "file", tmp_path / "new"):
        with pytest.raises(Exception, match="is not writable"):
            must_be_writable(path, "--output")


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "--output", "/nonexistent/x.json"],
        ["bench", "--plot", "/dev/null/plots"],
        ["tune", "--data", "/nonexistent/x.jsonl"],
        ["tune", "--write-table", "--table", "/dev/null/x.json"],
    ],
    ids=" ".join,
)
def test_results_that_cannot_be_written_are_refused_before_measuring(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    for module in (_bench, _tune):
        monkeypatch.setattr(module, "require_hopper", lambda: 1 / 0)
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "cannot be written: /" in result.stderr


def test_matplotlib_is_asked_for_before_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_bench, "require_hopper", lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", "--plot", str(tmp_path / "plots"))
    assert result.exit_code == 3
    assert "needs the Python package 'matplotlib'" in result.stderr


def test_rows_are_printed_though_the_file_fails_and_kept_though_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_bench_ranks, "run", lambda *_, **__: found())
    words = ["bench", "--shapes", "v4-flash", "--tokens", "64", "--ranks", "2", "--output", str(tmp_path / "x.json")]
    with monkeypatch.context() as patch:
        patch.setattr(_bench_report, "write", full)
        result = invoke(*words)
    assert result.exit_code == 1
    assert "ONE RANK us" in result.stdout
    assert result.stderr.endswith("Error: No space left on device\n")
    monkeypatch.setattr(importlib.import_module("megamoe_jit._cli.bench"), "_show_others", full)
    assert invoke(*words).exit_code == 1
    assert json.loads((tmp_path / "x.json").read_text())["rows"]


def test_cells_are_printed_though_the_table_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_tune_table, "write_table", lambda *_: 1 / 0)
    data = ROOT / "benchmarks" / "results" / "2026-11-23-h200-tuning.jsonl"
    table = str(tmp_path / "t.json")
    result = invoke("tune", "--no-measure", "--data", str(data), "--write-table", "--table", table)
    assert "cooperative, lag" in result.stdout


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_the_tables_are_what_the_command_writes(card: str, tmp_path: Path):
    (data,) = sorted((ROOT / "benchmarks" / "results").glob(f"*-{card}-tuning.jsonl"))
    written = _tune_table.write_table(_tune.read(data), tmp_path / "table.json")
    assert written.read_text() == (FOLDER / f"{card}.json").read_text()


def test_tuning_data_that_do_not_exist_are_an_error(tmp_path: Path):
    result = invoke("tune", "--no-measure", "--data", str(tmp_path / "none.jsonl"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--data {tmp_path / 'none.jsonl'} does not exist" in result.stderr


def test_a_sealed_process_uses_what_is_cached_and_forces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("warmup", "--shapes", "v4-flash", "--inputs", "staged", "--cache-dir", str(tmp_path / "kernels"))
    assert done.returncode == 0, done.stderr
    for places in (
        {"cache_dir": tmp_path / "kernels"},
        {"cache_dir": tmp_path / "none", "readonly_cache": (tmp_path / "kernels",)},
    ):
        with override(disable_jit=True, **places):
            result = invoke("demo", "--json")
        assert result.exit_code == 0, result.output
        assert [kernel["status"] for kernel in checked(result.stdout)["kernels"]] == ["cached", "cached"]
        assert "Looking in the caches" in result.stderr
    with override(disable_jit=True, cache_dir=tmp_path / "none"):
        assert invoke("demo", "--json").exit_code == 1
    with override(disable_jit=True, cache_dir=tmp_path / "kernels"):
        result = invoke("warmup", "--shapes", "v4-flash", "--force")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: --force compiles, which MEGAMOE_JIT_DISABLE_JIT forbids\n"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("KERNELS_SRC", "/nonexistent/src", "is no directory"), ("STRICT", "foo", "is not allowed; allowed: error")],
)
@pytest.mark.parametrize(
    "words", [["warmup", *STAGED], ["warmup", *STAGED, "--dry-run"], ["explain", *SIZES, "--tokens", "8"], ["demo"]]
)
def test_a_setting_that_is_wrong_is_no_failure_of_a_kernel_or_shape(words: list[str], name: str, value: str, says: str):
    done = run(*words, "--json", **{f"MEGAMOE_JIT_{name}": value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: MEGAMOE_JIT_{name}='{value}' {says}")
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_with_a_setting_that_is_wrong_names_no_shape():
    done = run("plan", *SIZES, "--tokens", "8", MEGAMOE_JIT_STRICT="foo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: MEGAMOE_JIT_STRICT='foo' is not allowed")


def test_a_warmup_without_a_cache_names_the_setting():
    done = run("warmup", *STAGED, "--variant", "pingpong", MEGAMOE_JIT_NO_CACHE="1")
    assert "1 could not be kept: MEGAMOE_JIT_NO_CACHE turns the cache off" in done.stderr


def test_a_dry_run_shows_what_the_cached_kernels_are(tmp_path: Path):
    root = str(warm_cache(tmp_path / "cache"))
    with override(cache_dir=Path(root)):
        planned, done = (
            checked(invoke("warmup", *STAGED, *more, "--json").stdout)["kernels"] for more in (("--dry-run",), ())
        )
        forced = checked(invoke("warmup", *STAGED, "--dry-run", "--force", "--json").stdout)["kernels"]
    for name in ("registers", "spill_bytes", "nvrtc"):
        assert [kernel[name] for kernel in planned] == [kernel[name] for kernel in done]
        assert [kernel[name] for kernel in forced] == [None, None]
    assert all(kernel["registers"] for kernel in planned)


@pytest.mark.parametrize("command", ["bench", "verify"])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_without_any_gpu_the_number_of_ranks_does_not_matter(command: str, ranks: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = invoke(command, "--ranks", ranks)
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: no CUDA device")
    assert result.stderr.endswith("; `megamoe-jit doctor` says more\n")


@pytest.mark.parametrize("script", ["floor", "launch_cost", "timeline"])
def test_benchmarks_parse_first_and_say_what_is_missing(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def start(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())

    code, out, _ = start("--help")
    assert (code, out.split(" [")[0]) == (0, f"usage: {script}.py")
    assert start("--wrong")[0] == 2
    code, out, err = start()
    assert (code, out) == (3, "")
    assert err.startswith("Error: no CUDA device")
    assert err.count("\n") == 1
