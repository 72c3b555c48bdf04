"""The command line as a process sees it: output streams, exit codes, documents, start-up."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit import _errors
from megamoe_jit._cache.metadata import dump_metadata, read_metadata
from megamoe_jit._cli import app as app_module
from megamoe_jit._cli import cli
from megamoe_jit._cli._io import table
from megamoe_jit._documents import SCHEMA_VERSION
from megamoe_jit._jit import runtime as _runtime
from megamoe_jit._text import human_bytes
from tests.commandline import SIZES, checked, leaf_commands, run, warm_cache

SMALL = SIZES


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_verbs():
    cache = ("clear", "export", "import", "info", "ls", "path", "prune", "rm", "stats", "verify")
    look = ("doctor", "env", "explain", "inspect", "inspect-checkpoint", "plan", "render")
    run_ = ("bench", "completion", "convert", "demo", "tune", "verify", "warmup")
    expected = [*(("cache", verb) for verb in cache), ("shapes", "ls"), *((verb,) for verb in look + run_)]
    assert sorted(leaf_commands()) == sorted(expected)


def test_the_help_lists_every_command_with_its_own_words():
    for name, summary in app_module.SUMMARIES.items():
        command = cli.commands[name]
        assert command.name == name
        assert " ".join((command.help or "").split("\n\n")[0].split()) == summary
    with pytest.raises(KeyError):
        cli.commands["warm"]
    shown = run("--help").stdout
    assert all(f"  {name} " in shown for name in cli.commands)


def test_the_help_names_every_exit_code():
    shown = " ".join(run("--help").stdout.split())
    codes = shown[shown.index("Exit codes:") :]
    assert all(f"{int(code)} " in codes for code in app_module.ExitCode)


@pytest.mark.parametrize("path", leaf_commands(), ids=" ".join)
def test_every_command_has_help_and_json(path: tuple[str, ...]):
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output


def test_module_runs_like_the_script():
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, "megamoe-jit, version 0.1.0")
    assert run("--help").stdout.startswith("Usage: megamoe-jit ")


LIGHT = ["--help", "shapes ls", "cache ls", "cache path", "cache stats", "cache verify", "cache clear --yes"]


@pytest.mark.parametrize("arguments", LIGHT)
def test_listings_import_nothing_heavy(arguments: str, tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    code = (
        "import sys; from megamoe_jit._cli import main; sys.argv = ['megamoe-jit', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'cuda.bindings', 'cuda.pathfinder', 'rich', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "MEGAMOE_JIT_CACHE_DIR": str(root)},
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_no_command_imports_anything_heavy():
    code = (
        "import importlib, sys; from megamoe_jit._cli.app import SUMMARIES\n"
        "for name in SUMMARIES: importlib.import_module('megamoe_jit._cli.' + name.replace('-', '_'))\n"
        "print(sorted({'torch', 'cuda.bindings', 'cuda.pathfinder', 'rich', 'numpy', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a thousand entries, as far as a listing looks at them."""
    warm = warm_cache(tmp_path_factory.mktemp("warm") / "cache")
    meta = read_metadata(next(warm.glob("v1/??/*/meta.json")).read_bytes())
    root = tmp_path_factory.mktemp("thousand")
    for number in range(1000):
        key = hashlib.sha256(str(number).encode()).hexdigest()
        folder = root / "v1" / key[:2] / key
        folder.mkdir(parents=True)
        (folder / "meta.json").write_bytes(dump_metadata({**meta, "key": key}))
    return root


COUNTED = """
import collections, json, runpy, sys
opened = collections.Counter()
sys.addaudithook(lambda event, args: opened.update([str(args[0]).rpartition("/")[2]]) if event == "open" else None)
sys.argv = ["megamoe-jit", *json.loads(sys.argv[1])]
try:
    runpy.run_module("megamoe_jit", run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
files = {name: opened[name] for name in ("meta.json", "kernel.cubin", "kernel.cu")}
heavy = sorted({"torch", "cuda.bindings", "cuda.pathfinder", "rich", "numpy", "jinja2", "pydantic"} & set(sys.modules))
own = sum(name.split(".")[0] == "megamoe_jit" for name in sys.modules)
print(json.dumps({"files": files, "heavy": heavy, "modules": len(sys.modules), "own": own}), file=sys.stderr)
"""


@pytest.mark.parametrize(("arguments", "entries", "own"), [(["--help"], 0, 9), (["cache", "ls"], 1000, 40)])
def test_listings_do_little(arguments: list[str], entries: int, own: int, thousand: Path):
    """Each entry's metadata is read once, and nothing heavy is imported; `benchmarks/runtime.py` has the times."""
    environ = {**os.environ, "MEGAMOE_JIT_CACHE_DIR": str(thousand)}
    command = [sys.executable, "-c", COUNTED, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environ)
    found = json.loads(done.stderr.splitlines()[-1])
    assert found["files"] == {"meta.json": entries, "kernel.cubin": 0, "kernel.cu": 0}
    assert found["heavy"] == []
    assert found["own"] <= own
    assert found["modules"] < 250


def test_shapes_ls():
    result = CliRunner().invoke(cli, ["shapes", "ls", "--json"])
    doc = checked(result.stdout)
    assert (doc["schema_version"], doc["kind"]) == (SCHEMA_VERSION, "shapes")
    flash = next(shape for shape in doc["shapes"] if shape["name"] == "v4-flash")
    assert [flash[k] for k in ("hidden", "intermediate", "experts", "topk", "ranks")] == [4096, 2048, 256, 6, 8]
    plain = CliRunner().invoke(cli, ["shapes", "ls"]).stdout
    assert all(shape["name"] in plain for shape in doc["shapes"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["warmup"], "--shapes"),
        (["warmup", "--shapes", "v4-flush"], "v4-flash"),
        (["warmup", "--shapes", "v4-flash", "--hidden", "256"], "exclude each other"),
        (["warmup", "--hidden", "100", "--intermediate", "128", "--experts", "4", "--topk", "1"], "multiple of 128"),
        (
            ["warmup", "--shapes", "v4-flash", "--ranks", "7"],
            "v4-flash: experts = 256 is not supported; allowed: a mult",
        ),
        (["warmup", "--shapes", "v4-flash", "--cache-dir", ""], "'' is no directory"),
        (["explain", "--shapes", "v4-flash,v4-pro", "--tokens", "4", "--ranks", "128"], "v4-flash: ranks = 128"),
        (["plan", "--shapes", "v4-pro", "--tokens", "4", "--ranks", "0"], "0 is not in the range"),
        (
            ["explain", "--shapes", "v4-flash", "--tokens", "4", "--ranks", "0", "--gpu", "h200"],
            "0 is not in the range",
        ),
        (["verify", "--filter", "nothing_like_it"], "no scenario fits"),
        (["bench", "--tokens", "16,x"], "whole numbers"),
        (["bench", "--output", "rows.txt"], ".json or .csv"),
        (["bench", "--shapes", "v4-flush"], "v4-flash"),
        (["warm"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(arguments: list[str], says: str, monkeypatch):
    # where there is none it may come first, before torch is imported
    monkeypatch.setattr("megamoe_jit._device.driver.refuse_without_gpu", lambda: None)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_commands_that_need_a_gpu_say_so(command: str):
    result = CliRunner().invoke(cli, [command])
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: ")
    assert "Hopper" in result.stderr
    assert result.stdout == ""


def test_without_a_compiler():
    done = run("warmup", *SMALL, "--force", MEGAMOE_JIT_NVRTC="/nonexistent/libnvrtc.so")
    assert done.returncode == 3
    assert done.stderr.count("/nonexistent/libnvrtc.so") == 1
    assert "Traceback" not in done.stderr


def test_a_setting_that_is_not_allowed():
    done = run("cache", "path", MEGAMOE_JIT_STRICT="maybe")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: MEGAMOE_JIT_STRICT='maybe'")


@pytest.mark.parametrize("name", _errors.__all__)
def test_every_library_error_has_an_exit_code(name: str):
    code = app_module._exit_code(getattr(_errors, name)("what happened"))
    assert code in (1, 2, 3, 4)
    assert (code == 2) == (name == "ConfigError")
    assert (code == 4) == (name == "CheckpointError")


def test_verify_lists_without_a_gpu():
    result = CliRunner().invoke(cli, ["verify", "--list", "--filter", "L1,L4", "--json"])
    names = checked(result.stdout)["scenarios"]
    assert "L1.smoke" in names
    assert {name.split(".")[0] for name in names} == {"L1", "L4"}


def test_cache_path(tmp_path: Path):
    done = run("cache", "path", MEGAMOE_JIT_CACHE_DIR=str(tmp_path / "kernels"))
    assert done.stdout == f"{tmp_path / 'kernels'}\n"
    empty = run("cache", "ls", MEGAMOE_JIT_CACHE_DIR=str(tmp_path / "kernels"))
    assert (empty.returncode, empty.stdout) == (0, "")
    assert not (tmp_path / "kernels").exists(), "looking must not create anything"


@pytest.mark.usefixtures("no_gpu")
def test_demo_without_a_gpu():
    result = CliRunner().invoke(cli, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    doc = checked(result.stdout)
    assert doc["passed"] is True
    assert [kernel["status"] for kernel in doc["kernels"]] == ["compiled", "compiled"]
    assert all(check["passed"] for check in doc["checks"])
    assert "No Hopper GPU" in result.stderr


@pytest.mark.usefixtures("no_gpu")
def test_demo_notices_a_wrong_reference(monkeypatch: pytest.MonkeyPatch):
    from megamoe_jit import reference

    monkeypatch.setattr(_runtime, "warmup", lambda *_, **__: [])
    right = reference.activate
    monkeypatch.setattr(reference, "activate", lambda gate, up, clamp: right(up, gate, clamp))
    result = CliRunner().invoke(cli, ["demo", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False


def test_table_and_bytes():
    assert table(("A", "N"), [("x", 1), ("long", 22)]).splitlines() == ["A      N", "x      1", "long  22"]
    assert [human_bytes(n) for n in (0, 1023, 1024, 5 << 20, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
