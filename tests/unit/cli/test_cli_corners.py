"""The command line and the diagnosis where something is missing, odd, or fails at a bad moment."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import math
import os
import pwd
import runpy
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from megamoe_jit._bench import measure as _bench
from megamoe_jit._cache import entry as _entry
from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.documents import Compiler, Entry
from megamoe_jit._check import verify as _verify
from megamoe_jit._cli import _io, _keys, app, cli
from megamoe_jit._cli.cache import _fields
from megamoe_jit._compile import toolchain as _toolchain
from megamoe_jit._compile.toolchain import Toolchain, find_toolchain
from megamoe_jit._device.driver import Machine
from megamoe_jit._diagnose import doctor as _doctor
from megamoe_jit._diagnose import inspect as _inspect
from megamoe_jit._diagnose import machine as _machine
from megamoe_jit._diagnose.explain import kernel_state
from megamoe_jit._diagnose.finding import Status
from megamoe_jit._documents import Document
from megamoe_jit._errors import CompileError, ConfigError, LoadError, ToolchainError, UnsupportedDeviceError
from megamoe_jit._jit import runtime as _runtime
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.runtime import WarmupResult, forget
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from tests.commandline import PINGPONG, SIZES, STAGED, run
from tests.stubs import KEY, fake_cubin

SPEC = KernelSpec(MoEShape(256, 128, 4, 1), Variant.PINGPONG)


def invoke(*words: str, **more):
    return CliRunner().invoke(cli, list(words), **more)


@dataclass(frozen=True, slots=True)
class Part:
    figure: float
    beside: float | None = None


@dataclass(frozen=True, slots=True)
class Figures(Document):
    KIND = "figures"

    one: float
    parts: tuple[Part, ...]
    deep: dict[str, Any]


def test_numbers_that_json_has_not_become_null_at_any_depth(capsys):
    parts = (Part(math.inf), Part(1.5, 2.5))
    _io.emit(Figures(math.nan, parts, {"c": [1.5, (math.inf, Part(-math.inf))], "d": [[True, None]]}))
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "kind": "figures",
        "one": None,
        "parts": [{"figure": None}, {"figure": 1.5, "beside": 2.5}],
        "deep": {"c": [1.5, [None, {"figure": None}]], "d": [[True, None]]},
    }


def test_a_field_is_left_out_only_where_none_is_its_default(capsys):
    _io.emit(Figures(1.0, (Part(1.0),), {"figure": None}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:] == [' "one": 1.0,', ' "parts": [', '  {"figure": 1.0}', " ],", ' "deep": {"figure": null}', "}"]


def test_steps_on_a_terminal_scroll_above_a_count(capsys, monkeypatch):
    monkeypatch.setattr(_io, "live_terminal", lambda: True)
    with _io.progress_line("verify", 2) as step:
        step("passed  one [square]")
        step("passed  two")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.index("passed  one [square]") < captured.err.index("passed  two")


def test_missing_python_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = invoke("render", "v4-flash/pingpong")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "needs the Python package 'jinja2'" in result.stderr
    for words in (["warmup", *STAGED, "--force"], ["explain", *SIZES, "--tokens", "1"], ["inspect", PINGPONG]):
        forget()
        again = invoke(*words)
        assert (again.exit_code, again.stdout) == (3, ""), words
        assert again.stderr.endswith(result.stderr)
    forget()


def test_missing_module_of_ours_is_no_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "megamoe_jit._diagnose.explain", None)
    result = invoke("plan", "--shapes", "v4-flash", "--tokens", "8")
    assert isinstance(result.exception, ModuleNotFoundError)


def test_ctrl_c_before_a_command_begins(monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "cli", interrupted)
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # whatever threads this process has beside the command's
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 130


def test_ctrl_c_while_modules_are_imported(monkeypatch):
    class Interrupted(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt if name == "main" else AttributeError(name)

    monkeypatch.setitem(sys.modules, "megamoe_jit._cli", Interrupted("megamoe_jit._cli"))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        runpy.run_module("megamoe_jit", run_name="__main__")
    assert (ended.type, ended.value.args) == (SystemExit, (130,))


def test_commands_are_those_of_the_table():
    commands = app._Commands(app.SUMMARIES)
    assert list(commands) == list(app.SUMMARIES)
    assert commands["inspect-checkpoint"] is commands.get("inspect-checkpoint")
    assert commands.get("more") is None


def test_completion_is_silent_where_settings_are_wrong():
    environ = {"_MEGAMOE_JIT_COMPLETE": "bash_complete", "COMP_WORDS": "megamoe-jit cache rm ", "COMP_CWORD": "3"}
    done = run(**environ, MEGAMOE_JIT_STRICT="maybe")
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_entry_that_cannot_be_read_just_now(cache, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})

    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(_entry, "read_entry", fail)
    with override(cache_dir=cache.root), pytest.raises(ConfigError, match="cannot be read: Too many open files"):
        _keys.load_entry(KEY[:8])


def test_listing_of_an_entry_that_says_little():
    entry = Entry(key="k", path="p", used_at="now", disk_bytes=1, files=[], nvrtc=Compiler("12.9", "b"))
    said = "key k path p disk_bytes 1 used_at now files - nvrtc.version 12.9 nvrtc.build b"
    assert " ".join(_fields(entry).split()) == said


def test_key_is_shown_as_it_was_typed():
    result = invoke("cache", "info", "AbC")
    assert result.exit_code == 2
    assert "key 'AbC' is not in the cache" in result.stderr


def test_verify_tells_what_fails(monkeypatch):
    passed = _verify.Outcome("L1.smoke", "pingpong", 1e-5, 1e-4, True, True, "")
    failed = _verify.Outcome("L1.smoke", "cooperative", math.nan, 0.0, True, False, "2 rows are not finite")

    def run_all(runs, device, note):
        for outcome in (passed, failed):
            note(outcome)
        return [passed, failed]

    monkeypatch.setattr(_bench, "require_hopper", lambda: torch.device("cpu"))
    monkeypatch.setattr(_runtime, "warmup", lambda *_, **__: [])
    monkeypatch.setattr(_verify, "run_all", run_all)
    result = invoke("verify", "--filter", "L1.smoke", "--variant", "pingpong", "--variant", "cooperative")
    assert result.exit_code == 1
    assert "FAILED  L1.smoke  cooperative: 2 rows are not finite" in result.stderr
    assert "1 passed, 1 failed, 0 not run" in result.stderr
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [
        ["L1.smoke", "pingpong", "1.00e-05", "1.00e-04", "passed"],
        ["L1.smoke", "cooperative", "-", "0.00e+00", "FAILED"],
    ]


@pytest.mark.parametrize("gpu", [False, True])
def test_demo_with_kernels_that_do_not_compile(monkeypatch, gpu):
    def hopper():
        if not gpu:
            raise UnsupportedDeviceError("none")

    def refused(specs, *_, **__):
        return [WarmupResult(spec, None, CompileError("no such instruction"), 0.1) for spec in specs]

    monkeypatch.setattr(_bench, "require_hopper", hopper)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("megamoe_jit._cli.demo.compile_kernels", refused)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "no such instruction" in result.stderr
    assert "FAILED: see above." in result.stderr


def test_doctor_in_colour(monkeypatch):
    def refuse(*_, **__):
        raise CompileError("first line\nsecond line")

    monkeypatch.setattr("megamoe_jit._compile.nvrtc.compile_source", refuse)
    monkeypatch.setattr("megamoe_jit._cli.doctor.colours_wanted", lambda: True)
    result = invoke("doctor", color=True)
    assert result.exit_code == 3
    assert "\x1b[31mfail\x1b[0m  trial compile  first line\n" + " " * 21 + "second line\n" in result.stdout


def test_doctor_on_compilers(monkeypatch):
    candidates = tuple(_machine.FoundCompiler("/x", "12.9", 12, origin) for origin in ("here", "there"))
    found = _machine.Compilers(_machine.ChosenCompiler("/x", "12.9", "b"), None, candidates)
    monkeypatch.setattr(_toolchain, "wanted_major", lambda: (13, "torch is built for CUDA 13.0"))
    other = _doctor.check_compiler(found)
    assert (other.status, "(2 found), but torch is built for CUDA 13.0" in other.detail) == ("warn", True)
    assert "pip install 'nvidia-cuda-nvrtc>=13,<14'" in other.next_step
    missing = _doctor.check_compiler(_machine.Compilers(None, "nowhere", ()))
    assert (missing.status, missing.detail) == ("fail", "nowhere")


def test_doctor_without_torch(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _doctor.check_torch(Machine(None, "none")).next_step == "pip install torch"


def test_doctor_on_a_trial_that_fails(monkeypatch):
    def refuse(*_, **__):
        raise CompileError("no such option")

    monkeypatch.setattr("megamoe_jit._compile.nvrtc.compile_source", refuse)
    failed = _doctor.check_trial(_machine.compilers())
    assert (failed.status, failed.detail) == ("fail", "no such option")


def test_doctor_where_locks_do_not_work(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with override(lock_dir=tmp_path):
        broken = _doctor._locks()
    assert (broken.status, broken.detail.endswith("cannot lock")) == ("warn", True)


def test_doctor_without_tools(monkeypatch):
    monkeypatch.setattr(_doctor, "find_tool", lambda _: None)
    tools = _doctor._tools()
    assert (tools.status, tools.next_step) == ("ok", "pip install nvidia-cuda-nvdisasm")


def test_owner_who_is_in_no_user_database(monkeypatch, tmp_path):
    def nobody(_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert _doctor._owner(tmp_path.stat()) == str(os.geteuid())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "holds no v1"),
        (lambda root: (root / "v1").mkdir(parents=True), "kernels: 0"),
        (lambda root: ((root / "v1").mkdir(parents=True), (root / "v1").chmod(0o777)), "can be written by other users"),
    ],
    ids=["absent", "empty", "no kernels", "writable"],
)
def test_doctor_on_a_read_only_cache_that_gives_nothing(tmp_path, make, says):
    make(tmp_path / "kernels")
    with override(readonly_cache=(tmp_path / "kernels",)):
        check = _doctor._read_only()
    assert (check.status, "MEGAMOE_JIT_READONLY_CACHE" in check.next_step) == ("warn", True)
    assert check.detail.startswith(f"{tmp_path / 'kernels'}: ")
    assert says in check.detail
    assert check.data["caches"][0]["entries"] == 0


def test_doctor_on_read_only_caches(cache):
    assert _doctor._read_only().status is Status.OK
    cache.store(KEY, fake_cubin(), "", {})
    with override(readonly_cache=(cache.root,)):
        check = _doctor._read_only()
    assert (check.status, check.detail) == ("ok", f"{cache.root}: kernels: 1")


def test_read_only_cache_that_does_not_exist_is_warned_of_once(tmp_path, warnings):
    missing = KernelCache(tmp_path / "typo", read_only=True)
    assert [missing.load(KEY) for _ in range(3)] == [None] * 3
    assert [w.getMessage() for w in warnings] == [f"read-only kernel cache {tmp_path / 'typo'} does not exist"]
    (tmp_path / "typo").mkdir()
    assert KernelCache(tmp_path / "typo", read_only=True).load(KEY) is None
    assert len(warnings) == 1


def test_explain_finds_a_kernel_that_another_compiler_built(tmp_path, monkeypatch):
    kernel = get_kernel(SPEC)
    shutil.copytree(user_cache().root, tmp_path / "given")
    real = find_toolchain()
    other = Toolchain(real.path, real.version, "another build")
    monkeypatch.setattr(_toolchain, "find_toolchain", lambda: other)
    with override(cache_dir=tmp_path / "empty"):
        assert kernel_state(SPEC).cached is False
        with override(readonly_cache=(tmp_path / "given",)):
            state = kernel_state(SPEC)
    assert (state.cached, state.key, state.problem) == (True, kernel.key, None)


def test_file_system_that_does_not_answer(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(_machine.os, "statvfs", refuse)
        assert _machine.file_system(tmp_path).free_bytes is None
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "cut off\n1 0 8:1 / / rw - ext4 /dev/sda rw\n")
    assert _machine._mount_of("/x") == ("/", "ext4")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert _machine._mount_of("/x") == ("", "unknown")


def test_tools_that_an_older_pathfinder_does_not_know(monkeypatch):
    import cuda.pathfinder

    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(cuda.pathfinder, "find_nvidia_binary_utility", unknown)
    monkeypatch.setattr(_machine, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}"))
    assert _machine.find_tool("nvdisasm") == "/usr/bin/nvdisasm"


def test_cubin_without_ptx_and_disassembler_that_does_not_start(monkeypatch, tmp_path):
    cubin = get_kernel(SPEC).cubin
    assert _inspect._section(cubin, ".no.such.section") is None
    monkeypatch.setattr(_inspect, "_PTX_SECTION", ".no.such.section")
    with pytest.raises(LoadError, match="carries no PTX"):
        _inspect.ptx(cubin)
    (tmp_path / "nvdisasm").write_text("not a program")
    monkeypatch.setattr(_inspect, "find_tool", lambda _: str(tmp_path / "nvdisasm"))
    with pytest.raises(ToolchainError, match="could not be run"):
        _inspect.sass(cubin)
