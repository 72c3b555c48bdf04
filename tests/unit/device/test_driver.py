"""A driver that starts, one that does not, and none: what it says, what `doctor` makes of it, how soon commands end."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import Any

import pytest

from megamoe_jit._device import driver as _driver
from megamoe_jit._device.driver import Gpu, Machine, gpus, refuse_without_gpu
from megamoe_jit._device.driver_advice import advice
from megamoe_jit._diagnose import doctor as _doctor
from megamoe_jit._diagnose.finding import Status
from megamoe_jit._diagnose.machine import ChosenCompiler, Compilers
from megamoe_jit._errors import UnsupportedDeviceError
from tests.commandline import run

H200 = Gpu(0, "NVIDIA H200", "9.0", 132, 141 << 30, True)
A100 = Gpu(0, "NVIDIA A100", "8.0", 108, 80 << 30, False)
CODES = (3, 34, 46, 100, 101, 304, 802, 803, 804, 805, 999)
COMPILER = Compilers(ChosenCompiler("/x", "12.9", "b"), None, ())


class Library:
    """Stands in for libcuda with one H200; `cuInit` answers with `code`."""

    def __init__(self, code: int = 0, named: bool = True) -> None:
        self.cuInit = lambda flags: code
        if named:
            self.cuGetErrorName = self._name

    @staticmethod
    def _name(code: int, out: Any) -> int:
        out._obj.value = b"CUDA_ERROR_SO_NAMED" if code != 77777 else None
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = 1
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, out: Any, which: int, device: int) -> int:
        out._obj.value = {75: 9, 76: 0, 16: 132}[which]
        return 0

    def cuDeviceGetName(self, out: ctypes.Array, size: int, device: int) -> int:
        out.value = b"NVIDIA H200"
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: int) -> int:
        out._obj.value = 141 << 30
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    """Puts a library in the driver's place."""
    return lambda found: monkeypatch.setattr(_driver, "_load", lambda: found)


def test_gpus_as_the_driver_describes_them(library):
    library(Library())
    assert gpus() == Machine("12.8", None, (H200,))


@pytest.mark.parametrize("code", CODES)
def test_a_driver_that_does_not_start_is_named_with_cause_and_step(library, code: int):
    library(Library(code))
    machine = gpus()
    assert machine == Machine(None, f"cuInit returned CUDA_ERROR_SO_NAMED ({code})", code=code)
    library(Library(code, named=False))
    assert _driver._NAMES[code] in str(gpus().problem)

    check = _doctor.check_driver(machine, COMPILER)
    assert check.detail == f"{machine.problem}: {advice(code).cause}"
    assert check.next_step == advice(code).step
    assert check.status is (Status.WARN if code in (34, 100) else Status.FAIL)
    assert (check.data["code"], "install" in check.next_step) == (code, False)
    others = [advice(other) for other in (*CODES, 12345) if other != code]
    assert all(advice(code).cause != other.cause and advice(code).step != other.step for other in others)


def test_codes_that_nobody_knows_are_shown(library):
    library(Library(77777))
    assert gpus() == Machine(None, "cuInit returned an unknown error (77777)", code=77777)
    check = _doctor.check_driver(gpus(), COMPILER)
    assert (check.status, "77777" in check.detail, "nvidia-smi" in check.next_step) == ("fail", True, True)
    assert _doctor.check_gpu(gpus()).next_step == "see driver above"


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch, library):
    monkeypatch.setattr(_driver, "LIBRARY", "libnothing-of-this-name.so.1")
    machine = gpus()
    assert (machine.driver_cuda, machine.code) == (None, None)
    assert "libnothing" in str(machine.problem)
    assert _doctor.check_driver(machine, COMPILER).detail == "no NVIDIA driver"
    library(object())  # a library that is no driver's
    assert gpus().driver_cuda is None


def test_the_words_for_the_well_known_codes():
    words = {802: "fabric manager", 803: "versions", 804: "compat", 100: "CUDA_VISIBLE_DEVICES", 34: "stub"}
    for code, word in words.items():
        assert word in advice(code).cause + advice(code).step


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine(None, "no libcuda"), r"no GPU here \(no libcuda\)"),
        (Machine("13.0", None), "the driver shows none"),
        (Machine("13.0", None, (A100,)), "A100 has compute capability 8.0; this command needs 9.0"),
        (Machine("13.0", None, (A100, H200)), None),
    ],
)
def test_a_refusal_that_needs_no_torch(machine: Machine, said: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(_driver, "gpus", lambda: machine)
    if said is None:
        refuse_without_gpu()
    else:
        with pytest.raises(UnsupportedDeviceError, match=said):
            refuse_without_gpu()


@pytest.mark.parametrize("command", ["verify", "bench", "tune"])
def test_commands_end_before_torch_is_imported(command: str):
    code = (
        "import json, sys\n"
        "from megamoe_jit._device import driver as _driver\n"
        "_driver.gpus = lambda: _driver.Machine(None, 'nothing here')\n"
        "from megamoe_jit._cli import cli\n"
        "try: cli([sys.argv[1]])\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted({'torch', 'numpy'} & set(sys.modules))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [3, []]
    assert "no GPU here (nothing here); this command needs a Hopper GPU (SM90)" in done.stderr


def test_what_is_wrong_with_the_arguments_comes_first():
    for words in (["bench", "--shapes", "nothing"], ["tune", "--lags", "100"], ["tune", "--rows", "3"]):
        assert run(*words).returncode == 2
