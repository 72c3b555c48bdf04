"""`megamoe-jit warmup`: which kernels it asks for, what it says of them, how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit import KernelSpec, MoEShape, Variant
from megamoe_jit._cli import cli
from megamoe_jit._documents import SCHEMA_VERSION
from megamoe_jit._jit import runtime as _runtime
from megamoe_jit._jit.kernel import warmup_command
from megamoe_jit._spec.any_layer import StageFormat, StageSpec
from megamoe_jit._spec.inputs import Inputs
from tests.commandline import SIZES, STAGED, checked, run, warm_cache

SMALL = STAGED


def test_warmup_compiles_then_finds_the_kernels(tmp_path: Path):
    first = run("warmup", *SMALL, "--json", MEGAMOE_JIT_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    doc = checked(first.stdout)
    assert (doc["schema_version"], doc["kind"]) == (SCHEMA_VERSION, "warmup")
    assert (doc["compiled"], doc["cached"], doc["failed"]) == (2, 0, 0)
    assert {kernel["spec"]["variant"] for kernel in doc["kernels"]} == {"pingpong", "cooperative"}
    assert all(kernel["stored"] for kernel in doc["kernels"])
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


@pytest.mark.parametrize(
    "environ", [{"MEGAMOE_JIT_CACHE_DIR": "/proc/nowhere"}, {"MEGAMOE_JIT_NO_CACHE": "1"}], ids=str
)
def test_a_warmup_that_keeps_nothing_has_failed(environ: dict[str, str]):
    done = run("warmup", *SMALL, "--variant", "pingpong", "--json", **environ)
    assert done.returncode == 1
    doc = checked(done.stdout)
    assert (doc["compiled"], doc["failed"]) == (1, 0)
    assert doc["kernels"][0]["stored"] is False
    assert "could not be kept" in done.stderr


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
    staging = [StageSpec(form) for form in StageFormat]
    for arguments, expected in (
        (SIZES, [KernelSpec(mine, v) for v in both]),
        (["--shapes", str(file)], [KernelSpec(mine, v) for v in both]),
        (["--shapes", f"v4-flash,{file},v4-flash"], [KernelSpec(s, v) for s in (flash, mine) for v in both]),
        ([*SIZES, "--variant", "pingpong"], [KernelSpec(mine, Variant.PINGPONG)]),
        (["--shapes", "v4-flash", "--ranks", "8"], [KernelSpec(flash, v, ranks=8) for v in both]),
        ([*SIZES, "--shared", "2"], [KernelSpec(replace(mine, shared=2), v) for v in both]),
        (["--shapes", "v4-flash", "--shared", "1"], [KernelSpec(replace(flash, shared=1), v) for v in both]),
        ([*SIZES, "--no-fast-math"], [KernelSpec(mine, v, fast_math=False) for v in both]),
    ):
        raw = [*(replace(spec, inputs=Inputs.RAW) for spec in expected), *staging]
        for inputs, wanted in (("staged", expected), ("raw", raw), ("all", [*expected, *raw])):
            requested.clear()
            result = CliRunner().invoke(cli, ["warmup", *arguments, "--inputs", inputs])
            assert result.exit_code == 0, result.output
            assert len(requested) == len(wanted)
            assert set(requested) == set(wanted), arguments
        requested.clear()
        assert CliRunner().invoke(cli, ["warmup", *arguments]).exit_code == 0
        assert set(requested) == set(wanted), "all of them by default"


def test_shared_experts_that_no_kernel_takes_are_refused_by_the_shapes_name():
    result = CliRunner().invoke(cli, ["warmup", "--shapes", "v4-flash,qwen3-30b-a3b", "--shared", "25", "--dry-run"])
    assert result.exit_code == 2
    assert "qwen3-30b-a3b: shared = 25 is not supported; allowed: 0 to 24" in result.output


@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG),
        KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG, inputs=Inputs.RAW),
        KernelSpec(MoEShape(256, 128, 4, 1, shared=3), Variant.PINGPONG, ranks=2),
        KernelSpec(MoEShape(7168, 3072, 384, 6), Variant.COOPERATIVE, ranks=8, fast_math=False),
    ],
    ids=lambda spec: spec.kernel_name,
)
def test_the_advised_warmup_command_asks_for_that_kernel(requested: list[KernelSpec], spec: KernelSpec):
    program, *arguments = warmup_command(spec).split()
    assert program == "megamoe-jit"
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert requested == [spec, *(StageSpec(form) for form in StageFormat if spec.inputs is Inputs.RAW)]


def test_fail_fast_begins_nothing_after_the_first_failure(tmp_path: Path):
    arguments = ("warmup", "--shapes", "all", "--jobs", "1", "--json", "--cache-dir", str(tmp_path))
    done = run(*arguments, "--fail-fast", MEGAMOE_JIT_DISABLE_JIT="1")
    doc = checked(done.stdout)
    assert done.returncode == 1
    assert doc["failed"] == 1
    assert doc["skipped"] == len(doc["kernels"]) - 1
    assert f"{doc['skipped']} skipped" in done.stderr
    whole = checked(run(*arguments, MEGAMOE_JIT_DISABLE_JIT="1").stdout)
    assert (whole["failed"], whole["skipped"]) == (len(doc["kernels"]), 0)


def test_a_dry_run_compiles_nothing(tmp_path: Path):
    done = run("warmup", *SMALL, "--dry-run", "--json", "--cache-dir", str(tmp_path / "cache"))
    doc = checked(done.stdout)
    assert (done.returncode, doc["missing"], doc["compiled"]) == (0, 2, 0)
    assert not (tmp_path / "cache").exists()
    root = warm_cache(tmp_path / "warm")
    for more, expected in (((), (2, 0)), (("--force",), (0, 2))):
        doc = checked(run("warmup", *SMALL, *more, "--dry-run", "--json", "--cache-dir", str(root)).stdout)
        assert (doc["cached"], doc["missing"]) == expected
    assert run("warmup", *SMALL, "--dry-run", MEGAMOE_JIT_NVRTC="/nonexistent/libnvrtc.so").returncode == 3


def test_a_kernel_that_is_missing_and_must_not_be_compiled(tmp_path: Path):
    done = run("warmup", *SMALL, MEGAMOE_JIT_CACHE_DIR=str(tmp_path), MEGAMOE_JIT_DISABLE_JIT="1")
    assert done.returncode == 1
    assert "2 failed" in done.stderr
    assert "MEGAMOE_JIT_DISABLE_JIT" in done.stderr
    assert "Traceback" not in done.stderr
