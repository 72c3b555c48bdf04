"""Advice about NVRTC and cache directories: it can be followed, and it is about what was found."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

from megamoe_jit._compile import toolchain as _toolchain
from megamoe_jit._compile import wheels as _wheels
from megamoe_jit._compile.toolchain import candidates, find_toolchain
from megamoe_jit._compile.wheels import wheel_command
from megamoe_jit._device.driver import Gpu, Machine
from megamoe_jit._diagnose import doctor as _doctor
from megamoe_jit._diagnose import machine as _machine
from megamoe_jit._diagnose.machine import ChosenCompiler, Compilers
from megamoe_jit._errors import ToolchainError
from megamoe_jit._settings.settings import Settings, override
from tests.commandline import run

H200 = Gpu(0, "NVIDIA H200", "9.0", 132, 141 << 30, True)


@pytest.fixture(autouse=True)
def forget_choice():
    _toolchain._find_once.cache_clear()
    yield
    _toolchain._find_once.cache_clear()


def test_wheels_are_those_of_the_extras():
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for major in (12, 13):
        wanted = {_wheels.NVRTC[major], _wheels.BINDINGS[major]}
        assert wanted == set(extras["optional-dependencies"][f"cu{major}"])


def test_the_package_itself_is_on_no_index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_toolchain, "_search", lambda: iter(()))
    for major, wheel in ((13, "nvidia-cuda-nvrtc>=13,<14"), (12, "nvidia-cuda-nvrtc-cu12>=12.8,<13")):
        monkeypatch.setattr(_toolchain, "wanted_major", lambda major=major: (major, "so it is"))
        with pytest.raises(ToolchainError, match=f"Run: pip install '{wheel}' "):
            find_toolchain()
        found = _machine.compilers()
        assert _doctor.check_compiler(found).next_step == "install NVRTC as the message says"
    assert wheel_command(None) == wheel_command(12)


@pytest.mark.parametrize(("driver", "step"), [("12.8", "nvidia-cuda-nvrtc-cu12>=12.8,<13"), ("11.4", "update")])
def test_advice_for_an_older_driver(driver: str, step: str):
    found = Compilers(ChosenCompiler("/x", "13.0", "b"), None, ())
    check = _doctor.check_driver(Machine(driver, None, (H200,)), found)
    assert check.next_step.startswith((step, f"pip install '{step}'"))
    assert "megamoe-jit[" not in check.next_step


def test_advice_without_cuda_python(monkeypatch: pytest.MonkeyPatch):
    path = find_toolchain().path
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(ToolchainError, match="Run: pip install 'cuda-python>="):
        _toolchain._activate(path)


def test_variable_that_names_no_library(tmp_path: Path):
    missing = str(tmp_path / "nope.so")
    doc = json.loads(run("doctor", "--json", MEGAMOE_JIT_NVRTC=missing).stdout)
    check = next(check for check in doc["checks"] if check["name"] == "compiler")
    assert check["next_step"] == "correct or unset MEGAMOE_JIT_NVRTC"
    assert check["detail"].endswith(
        f"{missing} (from MEGAMOE_JIT_NVRTC) does not exist. Correct or unset MEGAMOE_JIT_NVRTC"
    )
    assert check["data"]["candidates"] == []
    shown = run("env", MEGAMOE_JIT_NVRTC=missing).stdout
    assert not [line for line in shown.splitlines() if line.split()[:1] == ["found"]]


def test_settings_file_and_argument_that_name_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "config.toml"
    config.write_text("nvrtc = 'nope.so'\n")
    settings = Settings.load({"MEGAMOE_JIT_CONFIG": str(config)})
    monkeypatch.setattr(_toolchain, "get_settings", lambda: settings)
    says = rf"nope\.so \(from the settings file {config}\) does not exist\. Correct nvrtc in the settings file {config}"
    with pytest.raises(ToolchainError, match=says):
        find_toolchain()
    monkeypatch.undo()
    with override(nvrtc=tmp_path / "nope.so"), pytest.raises(ToolchainError, match=r"Pass another nvrtc, or none"):
        find_toolchain()
    with override(nvrtc=tmp_path / "nope.so"):
        assert candidates() == ()


def test_named_library_that_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "libnvrtc.so.12").write_bytes(b"")
    (tmp_path / "libnvrtc-builtins.so.12.2").write_bytes(b"")
    monkeypatch.setattr(_toolchain, "wanted_major", lambda: (13, "so it is"))
    with override(nvrtc=tmp_path / "libnvrtc.so.12"):
        with pytest.raises(ToolchainError, match=r"12\.2 .* too old; .* Pass another nvrtc"):
            find_toolchain()
        found = Compilers(ChosenCompiler("/x", "12.9", "b"), None, ())
        assert _doctor.check_compiler(found).next_step == "pass another nvrtc, or none"


def test_doctor_on_a_file_in_place_of_the_cache(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with override(cache_dir=tmp_path / "file"):
        check = _doctor._cache()
    assert (check.status, check.detail.endswith(f"{tmp_path / 'file'} is not a directory")) == ("warn", True)
    assert "chmod" not in check.next_step
    assert "MEGAMOE_JIT_CACHE_DIR" in check.next_step
