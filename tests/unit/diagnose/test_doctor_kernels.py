"""What `megamoe-jit doctor` says of caches, and of ready kernels where none may be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._device.driver import Gpu, Machine
from megamoe_jit._diagnose import doctor as _doctor
from megamoe_jit._diagnose.finding import Status
from megamoe_jit._diagnose.machine import ChosenCompiler, Compilers
from megamoe_jit._settings.settings import override
from tests.commandline import COOPERATIVE, PINGPONG, STAGED, checked, damage, keys_of, run, warm_cache
from tests.stubs import KEY, fake_cubin, rewrite_meta

H200 = Gpu(0, "NVIDIA H200", "9.0", 132, 141 << 30, True)
#: Root may enter every directory, unless it gives that up.
HUMBLE = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []


def doctor(*words: str, humble: bool = False, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks by name, of a new process, without root's rights if it is to be humble."""
    line = ["doctor", "--json", *words]
    if humble and HUMBLE:
        line = [*HUMBLE, sys.executable, "-m", "megamoe_jit", *line]
        done = subprocess.run(line, capture_output=True, text=True, timeout=240, env={**os.environ, **environ})
    else:
        done = run(*line, **environ)
    return done.returncode, {check["name"]: check for check in checked(done.stdout)["checks"]}


@pytest.mark.skipif(bool(HUMBLE) and not shutil.which("setpriv"), reason="root, and no setpriv")
@pytest.mark.parametrize(
    ("below", "mode", "says"),
    [
        ("v1", 0o775, "can be written by other users"),
        ("v1", 0o000, "Permission denied"),
        ("v1", 0o400, "Permission denied"),
        ("v1", 0o500, "cannot be written"),
        ("v1/.tmp", 0o775, "can be written by other users"),
        ("v1/ab", 0o775, "can be written by other users"),
        ("v1/ab", 0o500, "cannot be written"),
    ],
)
def test_doctor_looks_at_the_folders_that_a_cache_uses(tmp_path: Path, below: str, mode: int, says: str):
    root = tmp_path / "a cache"
    assert KernelCache(root).store(KEY, fake_cubin(), "", {})
    (root / below).chmod(mode)
    try:
        _, checks = doctor("--no-trial", humble=True, MEGAMOE_JIT_CACHE_DIR=str(root))
        found = checks["cache"]
        assert (found["status"], f"{root / below}" in found["detail"], says in found["detail"]) == ("warn", True, True)
        command, *_ = found["next_step"].split(", or ")
        assert command == f"chmod u+rwx,go-w '{root / below}'"
        subprocess.run(command, shell=True, check=True)
    finally:
        (root / below).chmod(0o700)
    assert doctor("--no-trial", humble=True, MEGAMOE_JIT_CACHE_DIR=str(root))[1]["cache"]["status"] == "ok"


def test_doctor_mends_a_cache_that_is_writable_as_a_whole(tmp_path: Path):
    root = warm_cache(tmp_path / "cache")
    subprocess.run(["chmod", "-R", "g+w", root], check=True)
    with override(cache_dir=root):
        wide = _doctor._cache()
        assert (wide.status, "more)" in wide.detail) == ("warn", True)
        command, *_ = wide.next_step.split(", or ")
        assert command == f"chmod -R u+rwX,go-w {root}"
        subprocess.run(command, shell=True, check=True)
        assert _doctor._cache().status is Status.OK
    assert KernelCache(root).verify() == []


def test_doctor_advises_no_chmod_of_what_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    KernelCache(tmp_path).store(KEY, fake_cubin(), "", {})
    (tmp_path / "v1").chmod(0o775)
    real = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: real + 1)
    with override(cache_dir=tmp_path):
        check = _doctor._cache()
    assert (check.status, "chmod" in check.next_step) == ("warn", False)


def test_doctor_asks_nothing_of_a_cache_that_is_not_used():
    with override(cache_dir=Path("/proc/absent"), no_cache=True):
        check = _doctor._cache()
    assert (check.status, "not used" in check.detail) == ("ok", True)


def sealed_verdict(**environ: str) -> tuple[str, int]:
    """What doctor says of the ready kernels where there is no compiler, and how a command that needs two ends."""
    environ = {"MEGAMOE_JIT_NVRTC": "/none/libnvrtc.so", "MEGAMOE_JIT_DISABLE_JIT": "1", **environ}
    code, checks = doctor(**environ)
    assert {checks[name]["status"] for name in ("compiler", "trial compile", "locks")} == {"ok"}
    assert (checks["kernels"]["status"] == "fail") == (code == 3)
    assert bool(checks["kernels"]["next_step"]) == (checks["kernels"]["status"] != "ok")
    return checks["kernels"]["status"], run("warmup", *STAGED, **environ).returncode


def test_doctor_misses_no_compiler_where_compiling_is_forbidden(tmp_path: Path):
    there = warm_cache(tmp_path / "there")
    own = str(tmp_path / "own")
    assert sealed_verdict(MEGAMOE_JIT_CACHE_DIR=own) == ("fail", 1)
    assert sealed_verdict(MEGAMOE_JIT_CACHE_DIR=own, MEGAMOE_JIT_READONLY_CACHE=str(there)) == ("ok", 0)
    compiled = str(there)  # as the user's cache its kernels are those of one exact compiler
    assert sealed_verdict(MEGAMOE_JIT_CACHE_DIR=compiled) == ("fail", 1)
    assert run("cache", "export", str(tmp_path / "k.tgz"), MEGAMOE_JIT_CACHE_DIR=compiled).returncode == 0
    assert run("cache", "import", str(tmp_path / "k.tgz"), MEGAMOE_JIT_CACHE_DIR=own).returncode == 0
    assert sealed_verdict(MEGAMOE_JIT_CACHE_DIR=own) == ("ok", 0)
    damage(there, keys_of(there)[PINGPONG])
    none = str(tmp_path / "none")
    assert sealed_verdict(MEGAMOE_JIT_CACHE_DIR=none, MEGAMOE_JIT_READONLY_CACHE=str(there)) == ("warn", 1)
    again = run("cache", "import", str(tmp_path / "k.tgz"), "--cache-dir", str(there))
    assert again.returncode == 0, "what doctor advises"
    assert sealed_verdict(MEGAMOE_JIT_CACHE_DIR=none, MEGAMOE_JIT_READONLY_CACHE=str(there)) == ("ok", 0)


def test_doctor_on_ready_kernels_that_no_call_takes(tmp_path: Path):
    there = warm_cache(tmp_path / "there")
    here, old = Machine(None, "none"), Machine("11.8", None, (H200,))
    with override(disable_jit=True, readonly_cache=(there,), no_cache=True):
        fine = _doctor.check_ready_kernels(here)
        assert (fine.status, fine.data["usable"]) == ("ok", sorted(keys_of(there)))
        assert _doctor.check_driver(old, Compilers(ChosenCompiler("/x", "13.0", "b"), None, ())).status is Status.OK, (
            "nothing is compiled with that NVRTC"
        )
        assert "too new for this driver (CUDA 11.8): 2" in _doctor.check_ready_kernels(old).detail
        with override(ptxas_options=("-O1",)):
            assert "other sources or options: 2" in _doctor.check_ready_kernels(here).detail
        rewrite_meta(KernelCache(there).entry_path(keys_of(there)[PINGPONG]), advisories=["C7510"])
        lossy = _doctor.check_ready_kernels(here)
        assert (lossy.status, lossy.data["usable"]) == ("ok", [COOPERATIVE])
        (there / "v1").chmod(0o777)
        assert _doctor.check_ready_kernels(here).status is Status.FAIL
