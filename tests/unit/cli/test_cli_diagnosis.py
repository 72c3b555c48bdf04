"""`explain`, `plan`, `render`, `inspect`, `env`, `completion`: what they find and how they end."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit import KernelSpec, MoEShape, Variant
from megamoe_jit._cli import cli
from megamoe_jit._cli._names import parse_spec
from megamoe_jit._compile.render import render
from megamoe_jit._device.layout import buffer_layout
from megamoe_jit._diagnose import inspect as _inspect
from megamoe_jit._diagnose import machine as _machine
from megamoe_jit._diagnose.explain import explain
from megamoe_jit._diagnose.plan import memory_plan, shared_parts
from megamoe_jit._errors import ConfigError, LoadError, ToolchainError
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._settings.settings import override
from megamoe_jit._settings.variables import VARIABLES
from megamoe_jit._spec.formats import FORMATS, FP8, MXFP4
from megamoe_jit.heuristics.presets import preset, preset_names
from tests.commandline import PINGPONG, SIZES, checked, keys_of, run, warm_cache

SMALL = MoEShape(256, 128, 4, 1)
OTHER_FORMATS = [name for name in FORMATS if name != FP8.name]
ALL_SPECS = [
    KernelSpec(preset(name).shape, variant, ranks, fast)
    for name in preset_names()
    for variant in Variant.reading(FP8)
    for ranks in (1, preset(name).ranks)
    for fast in (True, False)
]
PACKED_SPECS = [
    KernelSpec(preset(name).shape, variant, preset(name).ranks, weights=MXFP4)
    for name in preset_names()
    for variant in Variant.reading(MXFP4)
]


def invoke(*words: str):
    return CliRunner().invoke(cli, list(words))


def test_kernels_are_named_by_symbol_or_shape():
    for spec in ALL_SPECS:
        assert parse_spec(spec.kernel_name) == spec
        assert parse_spec(f"{spec.kernel_name}_timeline") == replace(spec, timeline=True)
    flash, pro = preset("v4-flash").shape, preset("v4-pro").shape
    assert parse_spec("v4-flash/pingpong") == KernelSpec(flash, Variant.PINGPONG)
    assert parse_spec("v4-pro/cooperative/r8/exact") == KernelSpec(pro, Variant.COOPERATIVE, 8, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v4-flash", "SHAPE/VARIANT"),
        ("v4-flush/pingpong", "v4-flash"),
        ("v4-flash/pong", "pingpong"),
        ("v4-flash/pingpong/x", f"r1 to r8, exact, f32out, raw, {', '.join(OTHER_FORMATS)}, each once"),
        ("v4-flash/pingpong/r8/r4", "'r4' in .* is not understood"),
        ("v4-flash/pingpong/exact/exact", "each once"),
        ("v4-flash/pingpong/r7", "multiple of the number of ranks"),
        ("megamoe_pingpong_h100_i128_e4_k1_r1_fast", "multiple of 128"),
    ],
)
def test_kernels_that_are_not(text: str, says: str):
    with pytest.raises(ConfigError, match=says):
        parse_spec(text)
    for command in ("render", "inspect"):
        result = invoke(command, text)
        assert (result.exit_code, result.stdout) == (2, "")


def test_explain_follows_arguments_and_settings(tmp_path: Path):
    few, many = explain(SMALL, 255), explain(SMALL, 256)
    assert (few.variant, many.variant) == ("pingpong", "cooperative")
    assert any("255 tokens" in reason for reason in few.reasons)
    assert few.key == Wanted.of(KernelSpec(SMALL, Variant.PINGPONG)).key
    with override(variant="cooperative", cache_dir=tmp_path):
        forced = explain(SMALL, 1)
        assert (forced.variant, forced.cached) == ("cooperative", False)
        assert explain(SMALL, 1, variant="auto").variant == "pingpong"
    with override(cooperative_threshold=1):
        assert explain(SMALL, 1).variant == "cooperative"
        assert memory_plan(SMALL, 1).full_call == "cooperative"
    with override(cache_dir=warm_cache(tmp_path / "cache")):
        found = explain(SMALL, 1)
        assert found.cached
        assert Path(found.path).name == found.key


def test_explain_says_what_a_call_would_do_without_a_compiler():
    done = run("explain", *SIZES, "--tokens", "7", "--gpu", "none", MEGAMOE_JIT_NVRTC="/nonexistent/libnvrtc.so")
    assert done.returncode == 0, done.stderr
    assert "pingpong" in done.stdout
    assert "none: NVRTC library /nonexistent" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("explain", *SIZES), "--tokens"),
        (("explain", *SIZES, "--tokens", "x"), "whole numbers"),
        (("explain", *SIZES, "--tokens", "40000"), "32768"),
        (("explain", "--hidden", "256", "--tokens", "4"), "all of --hidden --intermediate --experts --topk"),
        (("plan", "--shapes", "v4-flash", "--topk", "2", "--tokens", "4"), "--shapes and --topk exclude each other"),
        (("plan", *SIZES, "--tokens", "0"), "whole numbers from 1"),
        (("plan", "--shapes", "v4-flash", "--tokens", "8", "--ranks", "3"), "multiple of the number of ranks"),
        (("plan", *SIZES, "--tokens", "8", "--sms", "0"), "--sms"),
        (("plan", *SIZES, "--tokens", "8", "--gpu", "B200"), "'B200'; allowed: "),
        (("inspect", "v4-flash/pingpong", "--ptx", "--sass"), "exclude each other"),
        (("completion", "tcsh"), "bash"),
    ],
    ids=str,
)
def test_wrong_usage(words: tuple[str, ...], says: str):
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("spec", [*ALL_SPECS, *PACKED_SPECS], ids=lambda spec: spec.kernel_name)
def test_the_parts_of_shared_memory_are_all_of_it(spec: KernelSpec):
    parts = {part.name: part.bytes for part in shared_parts(spec)}
    assert sum(parts.values()) == spec.shared_bytes
    assert parts.get("padding", 0) < 16, "a part is missing from the list"
    assert all(size > 0 for size in parts.values())


def test_plan_adds_up():
    shape = preset("v4-flash").shape
    found = memory_plan(shape, 1000, ranks=8)
    layout = buffer_layout(shape, 1000, 8)
    assert found.capacity == 1024
    assert found.buffer_bytes == layout.total_bytes == found.symmetric_bytes + found.local_bytes
    assert [section.name for section in found.local] == [section.name for section in layout.local]
    codes = 32 * 3 * 4096 * 2048
    assert found.weight_bytes == codes + codes // 128 // 128 * 4
    assert found.output_bytes == 1000 * 4096 * 2
    assert [kernel.variant for kernel in found.kernels] == ["pingpong", "cooperative"]
    assert (found.full_call, memory_plan(shape, 8, ranks=8).full_call) == ("cooperative", "pingpong")
    assert memory_plan(shape, 129).full_call == "cooperative", "129 tokens alone would take pingpong, but 256 fit"
    assert found.kernels[0].grid == (132, 1, 1)
    (only,) = memory_plan(shape, 1000, variant="cooperative", num_sms=78).kernels
    assert (only.variant, only.grid) == ("cooperative", (78, 1, 1))


def test_plan_counts_the_memory_that_weights_are_expanded_in():
    shape = preset("v4-flash").shape
    few, many = (memory_plan(shape, tokens, ranks=8, weights="mxfp4") for tokens in (8, 8192))
    assert [kernel.variant for kernel in few.kernels] == ["decode", "wide"], "what so small a buffer prepares"
    assert few.expanded_bytes == memory_plan(shape, 8192, ranks=8).expanded_bytes == 0
    assert many.expanded_bytes == 32 * 3 * 4096 * 2048 + 32 * (16 + 16) * 4
    assert memory_plan(shape, 8192, ranks=8, weights="mxfp4", variant="unpack").expanded_bytes == 0
    shown = invoke(
        "plan", "--shapes", "v4-flash", "--tokens", "8192", "--ranks", "8", "--weight-format", "mxfp4"
    ).stdout
    assert f"expanded        {many.expanded_bytes}" in shown
    total = many.buffer_bytes + many.weight_bytes + many.expanded_bytes + many.output_bytes
    assert f"total          {total}" in shown


def test_plan_shows_every_section():
    result = invoke("plan", "--shapes", "v4-flash", "--tokens", "4096", "--ranks", "8")
    assert result.exit_code == 0
    for section in (*buffer_layout(preset("v4-flash").shape, 4096, 8).local, "weights", "barriers", "grid 132"):
        assert (section if isinstance(section, str) else section.name) in result.stdout


def test_render_prints_what_the_compiler_gets():
    result = invoke("render", PINGPONG)
    assert result.stdout == render(KernelSpec(SMALL, Variant.PINGPONG)).text


def test_inspect_by_key_and_by_name(tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    key = keys_of(root)[PINGPONG]
    by_key = run("inspect", key[:9], "--cache-dir", str(root))
    by_name = run("inspect", PINGPONG, "--cache-dir", str(root))
    assert by_key.stdout == by_name.stdout
    assert by_key.stderr == by_name.stderr == ""
    rows = dict(line.split(None, 1) for line in by_key.stdout.splitlines())
    assert rows["kernel"] == PINGPONG
    assert int(rows["registers"].split()[0]) <= 168
    assert run("inspect", key, "--source", "--cache-dir", str(root)).stdout == render(parse_spec(PINGPONG)).text
    ptx = run("inspect", key, "--ptx", "--cache-dir", str(root)).stdout
    assert ptx.startswith(".version ")
    assert f".entry {PINGPONG}" in ptx
    assert ptx.rstrip().endswith("}")
    assert ".debug" not in ptx


def test_inspect_compiles_what_is_not_cached(tmp_path: Path):
    result = invoke("inspect", PINGPONG, "--cache-dir", str(tmp_path))
    assert result.exit_code == 0
    assert "was not cached: compiled in" in result.stderr
    again = run("inspect", PINGPONG, "--cache-dir", str(tmp_path / "other"), MEGAMOE_JIT_DISABLE_JIT="1")
    assert again.returncode == 1
    assert "megamoe-jit warmup" in again.stderr


def test_sass_through_whatever_tool_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cubin = get_kernel(KernelSpec(SMALL, Variant.PINGPONG)).cubin
    for name in _machine.TOOLS:
        tool = _machine.find_tool(name)
        if tool is None:
            continue
        monkeypatch.setattr(_inspect, "find_tool", lambda n, name=name, tool=tool: tool if n == name else None)
        text, used = _inspect.sass(cubin)
        assert used == tool
        assert "QGMMA" in text, "the tensor cores on FP8"
    monkeypatch.setattr(_inspect, "find_tool", lambda _: None)
    with pytest.raises(ToolchainError, match="pip install nvidia-cuda-nvdisasm"):
        _inspect.sass(cubin)
    result = invoke("inspect", PINGPONG, "--sass")
    assert (result.exit_code, result.stdout) == (3, "")

    broken = tmp_path / "nvdisasm"
    broken.write_text("#!/bin/sh\necho no good >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(_inspect, "find_tool", lambda _: str(broken))
    with pytest.raises(ToolchainError, match="no good"):
        _inspect.sass(cubin)
    with pytest.raises(LoadError):
        _inspect.resources("", b"nothing", {})


def test_tools_are_found_without_pathfinder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "nvdisasm").write_text("#!/bin/sh\n")
    (tmp_path / "nvdisasm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    assert _machine.find_tool("nvdisasm") == str(tmp_path / "nvdisasm")
    assert _machine.find_tool("cuobjdump") is None


def test_env_shows_value_and_source_of_every_setting(tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_text('strict = "warn"\njobs = 3\n')
    environ = {"MEGAMOE_JIT_CONFIG": str(file), "MEGAMOE_JIT_JOBS": "5", "MEGAMOE_JIT_PTXAS_OPTIONS": "-O2 --verbose"}
    done = run("env", "--json", **environ)
    assert done.returncode == 0, done.stderr
    doc = checked(done.stdout)
    settings = {setting["name"]: setting for setting in doc["settings"]}
    assert list(settings) == [variable.name for variable in VARIABLES]
    shown = {
        name: (settings[f"MEGAMOE_JIT_{name}"]["value"], settings[f"MEGAMOE_JIT_{name}"]["source"])
        for name in ("JOBS", "STRICT", "PTXAS_OPTIONS", "VARIANT")
    }
    assert shown == {
        "JOBS": (5, "environment"),
        "STRICT": ("warn", f"file {file}"),
        "PTXAS_OPTIONS": (["-O2", "--verbose"], "environment"),
        "VARIANT": ("auto", "default"),
    }
    assert doc["packages"]["torch"]
    assert doc["nvrtc"]["chosen"]["path"] in [candidate["path"] for candidate in doc["nvrtc"]["candidates"]]
    assert (doc["driver"]["problem"] is None) == (doc["driver"]["driver_cuda"] is not None)
    text = run("env", **environ).stdout
    assert all(variable.name in text for variable in VARIABLES)
    assert "(environment)" in text


def test_env_shows_settings_that_are_not_allowed(tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_text('strict = "warn"\njobs = 0\nno_cache = {a = 1}\ndebug = "a\\nb"\n')
    environ = {"MEGAMOE_JIT_CONFIG": str(file), "MEGAMOE_JIT_STRICT": "maybe"}
    done = run("env", "--json", **environ)
    assert done.returncode == 2
    doc = checked(done.stdout)
    settings = {setting["name"].removeprefix("MEGAMOE_JIT_"): setting for setting in doc["settings"]}
    assert list(settings) == [variable.field.upper() for variable in VARIABLES]
    problems = {
        "NO_CACHE": ("{'a': 1}", f"file {file}"),
        "STRICT": ("maybe", "environment"),
        "JOBS": (0, f"file {file}"),
        "DEBUG": ("a\nb", f"file {file}"),
    }
    assert {name for name, setting in settings.items() if setting["problem"]} == set(problems)
    assert {name: (settings[name]["value"], settings[name]["source"]) for name in problems} == problems
    strict = "MEGAMOE_JIT_STRICT='maybe' is not allowed; allowed: error, warn, ignore"
    jobs = f"settings file {file}: jobs = 0 is not allowed; allowed: a whole number, one or more"
    assert (settings["STRICT"]["problem"], settings["JOBS"]["problem"]) == (strict, jobs)
    assert doc["nvrtc"]["candidates"], "the rest is told all the same"
    assert {f"Error: {strict}", f"Error: {jobs}"} < set(done.stderr.splitlines())

    text = run("env", **environ)
    assert text.returncode == 2
    rows = [line.split(None, 1) for line in text.stdout.partition("settings\n")[2].splitlines()]
    assert [row[0] for row in rows] == [variable.name for variable in VARIABLES]
    assert dict(rows)["MEGAMOE_JIT_STRICT"].split(None, 2) == ["maybe", "(environment)", strict]


@pytest.mark.parametrize("text", [None, "jobs = ", "tool = {megamoe-jit = 1}"], ids=["missing", "no TOML", "no table"])
def test_env_where_the_settings_file_is_no_good(text: str | None, tmp_path: Path):
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(text)
    done = run("env", "--json", MEGAMOE_JIT_CONFIG=str(file), MEGAMOE_JIT_JOBS="3")
    assert done.returncode == 2
    config, *others = checked(done.stdout)["settings"]
    jobs = next(setting for setting in others if setting["name"] == "MEGAMOE_JIT_JOBS")
    assert (config["value"], config["source"]) == (str(file), "environment")
    assert str(file) in config["problem"]
    assert done.stderr == f"Error: {config['problem']}\n"
    assert (jobs["value"], jobs["source"]) == (3, "environment")
    assert not any(setting["problem"] for setting in others)


def complete(line: str, root: Path | None = None) -> list[str]:
    """What bash would offer for the last word of `line`."""
    words = line.split(" ")
    environ = {"_MEGAMOE_JIT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    if root is not None:
        environ["MEGAMOE_JIT_CACHE_DIR"] = str(root)
    return [row.split(",", 1)[1] for row in run(**environ).stdout.splitlines()]


def test_completion_of_commands_shapes_kernels_and_keys(tmp_path: Path):
    assert complete("megamoe-jit expl") == ["explain"]
    assert "rm" in complete("megamoe-jit cache r")
    assert complete("megamoe-jit warmup --shapes v4-flash,long") == ["v4-flash,longcat"]
    others = [name for name in OTHER_FORMATS if Variant.COOPERATIVE in Variant.reading(FORMATS[name])]
    names = ["v4-flash/cooperative", *(f"v4-flash/cooperative/{name}" for name in others)]
    assert complete("megamoe-jit render v4-flash/c") == names
    root = warm_cache(tmp_path / "cache")
    keys = {key[:12] for key in keys_of(root).values()}
    assert set(complete("megamoe-jit cache rm ", root)) == keys


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str):
    done = run("completion", shell)
    assert done.returncode == 0
    assert "_MEGAMOE_JIT_COMPLETE" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
