"""The command line as a process sees it: output streams, exit codes, documents, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megamoe_jit import KernelSpec, MoEShape, Variant, _errors, _runtime
from megamoe_jit._cli import app as app_module
from megamoe_jit._cli import cli
from megamoe_jit._cli._io import SCHEMA_VERSION, human_bytes, table

SMALL = ["--hidden", "256", "--intermediate", "128", "--experts", "4", "--topk", "1"]


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A new process, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "megamoe_jit", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environ},
    )


def leaf_commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    return [leaf for name, sub in command.commands.items() for leaf in leaf_commands(sub, (*path, name))]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_verbs():
    assert set(leaf_commands()) == {
        ("warmup",),
        ("cache", "ls"),
        ("cache", "path"),
        ("shapes", "ls"),
        ("verify",),
        ("bench",),
        ("demo",),
        ("env",),
    }


@pytest.mark.parametrize("path", leaf_commands(), ids=" ".join)
def test_every_command_has_help_and_json(path: tuple[str, ...]):
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output


def test_module_runs_like_the_script():
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, "megamoe-jit, version 0.1.0")
    assert run("--help").stdout.startswith("Usage: megamoe-jit ")


@pytest.mark.parametrize("arguments", [["--help"], ["shapes", "ls"], ["cache", "ls"], ["cache", "path"]], ids=" ".join)
def test_listings_import_nothing_heavy(arguments: list[str]):
    code = (
        "import sys; from megamoe_jit._cli import main; sys.argv = ['megamoe-jit', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'cuda.bindings', 'rich', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_starts_quickly():
    """Processor time of the best of several starts, less that of an empty interpreter."""

    def cost(*arguments: str) -> float:
        best = float("inf")
        for _ in range(5):
            before = os.times()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            best = min(best, spent)
        return best

    assert cost("-m", "megamoe_jit", "--help") - cost("-c", "") < 0.2


def test_shapes_ls():
    result = CliRunner().invoke(cli, ["shapes", "ls", "--json"])
    doc = json.loads(result.stdout)
    assert (doc["schema_version"], doc["kind"]) == (SCHEMA_VERSION, "shapes")
    flash = next(shape for shape in doc["shapes"] if shape["name"] == "v4-flash")
    assert [flash[k] for k in ("hidden", "intermediate", "experts", "topk", "ranks")] == [
        4096,
        2048,
        256,
        6,
        8,
    ]
    plain = CliRunner().invoke(cli, ["shapes", "ls"]).stdout
    assert all(shape["name"] in plain for shape in doc["shapes"])


def test_warmup_compiles_then_finds_the_kernels(tmp_path: Path):
    first = run("warmup", *SMALL, "--json", MEGAMOE_JIT_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    doc = json.loads(first.stdout)
    assert (doc["schema_version"], doc["kind"]) == (SCHEMA_VERSION, "warmup")
    assert (doc["compiled"], doc["cached"], doc["failed"]) == (2, 0, 0)
    assert {kernel["spec"]["variant"] for kernel in doc["kernels"]} == {"pingpong", "cooperative"}
    for kernel in doc["kernels"]:
        assert 0 < kernel["registers"] <= 255
        assert kernel["spill_bytes"] == 0
        assert 0 < kernel["shared_bytes"] <= 232448
        assert kernel["error"] is None

    second = run("warmup", *SMALL, MEGAMOE_JIT_CACHE_DIR=str(tmp_path), MEGAMOE_JIT_DISABLE_JIT="1")
    assert second.returncode == 0, second.stderr
    assert "2 cached" in second.stderr
    assert "\x1b" not in second.stdout + second.stderr, "escape codes away from a terminal"
    assert all(kernel["kernel"] in second.stdout for kernel in doc["kernels"])

    listed = json.loads(run("cache", "ls", "--json", MEGAMOE_JIT_CACHE_DIR=str(tmp_path)).stdout)
    assert {entry["key"] for entry in listed["entries"]} == {kernel["key"] for kernel in doc["kernels"]}
    assert listed["disk_bytes"] > 0
    text = run("cache", "ls", MEGAMOE_JIT_CACHE_DIR=str(tmp_path))
    assert len(text.stdout.splitlines()) == 3
    assert "2 kernels" in text.stderr


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """The kernels that commands ask for, which are not compiled."""
    specs: list[KernelSpec] = []
    monkeypatch.setattr(_runtime, "warmup", lambda wanted, **_: specs.extend(wanted) or [])
    return specs


def test_warmup_options_reach_the_kernels(requested: list[KernelSpec], tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text("[mine]\nhidden = 256\nintermediate = 128\nexperts = 4\ntopk = 1\n")
    mine, flash = MoEShape(256, 128, 4, 1), MoEShape(4096, 2048, 256, 6)
    both = (Variant.PINGPONG, Variant.COOPERATIVE)
    for arguments, expected in (
        (SMALL, [KernelSpec(mine, v) for v in both]),
        (["--shapes", str(file)], [KernelSpec(mine, v) for v in both]),
        (["--shapes", f"v4-flash,{file},v4-flash"], [KernelSpec(s, v) for s in (flash, mine) for v in both]),
        ([*SMALL, "--variant", "pingpong"], [KernelSpec(mine, Variant.PINGPONG)]),
        (["--shapes", "v4-flash", "--ranks", "8"], [KernelSpec(flash, v, ranks=8) for v in both]),
        ([*SMALL, "--no-fast-math"], [KernelSpec(mine, v, fast_math=False) for v in both]),
    ):
        requested.clear()
        result = CliRunner().invoke(cli, ["warmup", *arguments])
        assert result.exit_code == 0, result.output
        assert requested == expected, arguments


@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG),
        KernelSpec(MoEShape(7168, 3072, 384, 6), Variant.COOPERATIVE, ranks=8, fast_math=False),
    ],
    ids=lambda spec: spec.entry,
)
def test_the_advised_warmup_command_asks_for_that_kernel(requested: list[KernelSpec], spec: KernelSpec):
    program, *arguments = _runtime.warmup_command(spec).split()
    assert program == "megamoe-jit"
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert requested == [spec]


def test_a_kernel_that_is_missing_and_must_not_be_compiled(tmp_path: Path):
    done = run("warmup", *SMALL, MEGAMOE_JIT_CACHE_DIR=str(tmp_path), MEGAMOE_JIT_DISABLE_JIT="1")
    assert done.returncode == 1
    assert "2 failed" in done.stderr
    assert "MEGAMOE_JIT_DISABLE_JIT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["warmup"], "--shapes"),
        (["warmup", "--shapes", "v4-flush"], "v4-flash"),
        (["warmup", "--shapes", "v4-flash", "--hidden", "256"], "exclude each other"),
        (
            ["warmup", "--hidden", "100", "--intermediate", "128", "--experts", "4", "--topk", "1"],
            "multiple of 128",
        ),
        (["warmup", "--shapes", "v4-flash", "--ranks", "7"], "multiple of the number of ranks"),
        (["verify", "--filter", "nothing_like_it"], "no scenario fits"),
        (["bench", "--tokens", "16,x"], "whole numbers"),
        (["bench", "--output", "rows.txt"], ".json or .csv"),
        (["bench", "--shapes", "v4-flush"], "v4-flash"),
        (["warm"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(arguments: list[str], says: str):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_commands_that_need_a_gpu_say_so(command: str):
    result = CliRunner().invoke(cli, [command])
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
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
    assert done.stderr.startswith("error: MEGAMOE_JIT_STRICT='maybe'")


@pytest.mark.parametrize("name", _errors.__all__)
def test_every_library_error_has_an_exit_code(name: str):
    code = app_module._exit_code(getattr(_errors, name)("what happened"))
    assert code in (1, 2, 3)
    assert (code == 2) == (name == "ConfigError")


def test_verify_lists_without_a_gpu():
    result = CliRunner().invoke(cli, ["verify", "--list", "--filter", "L1,L4", "--json"])
    names = json.loads(result.stdout)["scenarios"]
    assert "L1.smoke" in names
    assert {name.split(".")[0] for name in names} == {"L1", "L4"}


def test_cache_path(tmp_path: Path):
    done = run("cache", "path", MEGAMOE_JIT_CACHE_DIR=str(tmp_path / "kernels"))
    assert done.stdout == f"{tmp_path / 'kernels'}\n"
    empty = run("cache", "ls", MEGAMOE_JIT_CACHE_DIR=str(tmp_path / "kernels"))
    assert (empty.returncode, empty.stdout) == (0, "")
    assert not (tmp_path / "kernels").exists(), "looking must not create anything"


def test_env(tmp_path: Path):
    from megamoe_jit._settings import VARIABLES

    done = run("env", "--json", MEGAMOE_JIT_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    assert [setting["name"] for setting in doc["settings"]] == [variable.name for variable in VARIABLES]
    cache_dir = doc["settings"][0]
    assert (cache_dir["value"], cache_dir["set"]) == (str(tmp_path), True)
    assert doc["packages"]["torch"]
    assert doc["nvrtc"]["chosen"]["path"] in [candidate["path"] for candidate in doc["nvrtc"]["candidates"]]
    assert (doc["driver"]["problem"] is None) == (doc["driver"]["driver_cuda"] is not None)
    text = run("env", MEGAMOE_JIT_CACHE_DIR=str(tmp_path)).stdout
    assert all(variable.name in text for variable in VARIABLES)


@pytest.mark.usefixtures("no_gpu")
def test_demo_without_a_gpu():
    result = CliRunner().invoke(cli, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    assert doc["passed"] is True
    assert [kernel["status"] for kernel in doc["kernels"]] == ["compiled", "compiled"]
    assert all(check["passed"] for check in doc["checks"])
    assert "No Hopper GPU" in result.stderr


@pytest.mark.usefixtures("no_gpu", "requested")
def test_demo_notices_a_wrong_reference(monkeypatch: pytest.MonkeyPatch):
    from megamoe_jit import reference

    right = reference.swiglu
    monkeypatch.setattr(reference, "swiglu", lambda gate, up, clamp: right(up, gate, clamp))
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
