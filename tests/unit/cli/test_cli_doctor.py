"""`megamoe-jit doctor`: each check on its own, and how the whole ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._device.driver import Gpu, Machine
from megamoe_jit._diagnose import doctor as _doctor
from megamoe_jit._diagnose import machine as _machine
from megamoe_jit._diagnose.finding import Status
from megamoe_jit._diagnose.machine import ChosenCompiler, Compilers
from megamoe_jit._settings.settings import override
from tests.commandline import checked, run
from tests.stubs import write_rooms


def invoke(*words: str):
    return CliRunner().invoke(cli, list(words))


H200 = Gpu(0, "NVIDIA H200", "9.0", 132, 141 << 30, True)
A100 = Gpu(1, "NVIDIA A100", "8.0", 108, 80 << 30, False)
NVRTC_13 = Compilers(ChosenCompiler("/x/libnvrtc.so.13", "13.0", "b"), None, ())


@pytest.mark.parametrize(
    ("machine", "driver", "gpu"),
    [
        (Machine(None, "no libcuda"), "warn", "warn"),
        (Machine("12.8", None, (H200,)), "fail", "ok"),
        (Machine("13.0", None, (H200,)), "ok", "ok"),
        (Machine("13.0", None, (A100,)), "ok", "fail"),
        (Machine("13.0", None, (H200, A100)), "ok", "warn"),
        (Machine("13.0", None, ()), "ok", "warn"),
    ],
)
def test_doctor_on_driver_and_gpu(machine: Machine, driver: str, gpu: str):
    on_driver, on_gpu = _doctor.check_driver(machine, NVRTC_13), _doctor.check_gpu(machine)
    assert (on_driver.status, on_gpu.status) == (driver, gpu)
    for check in (on_driver, on_gpu):
        assert bool(check.next_step) == (check.status is not Status.OK)


def test_doctor_on_a_gpu_machine_with_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megamoe_jit._compile.toolchain.installed_torch_cuda", lambda: None)
    assert _doctor.check_torch(Machine("13.0", None, (H200,))).status is Status.FAIL
    assert _doctor.check_torch(Machine(None, "none")).status is Status.OK
    monkeypatch.setattr("megamoe_jit._compile.toolchain.installed_torch_cuda", lambda: "12.8")
    assert "CUDA 12.8" in _doctor.check_torch(Machine("13.0", None, (H200,))).detail


def test_doctor_on_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def verdict(root: Path) -> _doctor.Check:
        with override(cache_dir=root):
            return _doctor._cache()

    absent = verdict(tmp_path / "absent")
    assert (absent.status, "not there yet" in absent.detail) == ("ok", True)
    open_ = tmp_path / "open"
    open_.mkdir()
    open_.chmod(0o777)
    wide = verdict(open_)
    assert (wide.status, "chmod" in wide.next_step) == ("warn", True)
    assert wide.data["mode"] == "0777"
    system = _machine.FileSystem("/mnt", "nfs4", True, 1 << 40)
    monkeypatch.setattr(_doctor, "file_system", lambda _: system)
    assert "network" in verdict(tmp_path / "absent").detail
    assert "MEGAMOE_JIT_CACHE_DIR" in verdict(tmp_path / "absent").next_step
    monkeypatch.setattr(_doctor, "file_system", lambda _: _machine.FileSystem("/", "ext4", False, 1000))
    assert "little space" in verdict(tmp_path / "absent").detail
    assert list(tmp_path.glob(".megamoe*")) == []
    assert "cannot be written" in verdict(Path("/proc/absent")).detail


def test_doctor_on_a_cache_that_is_a_link_to_nothing(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for link, below in (("link", ""), ("link", "cache"), ("loop", "")):
        with override(cache_dir=tmp_path / link / below):
            check = _doctor._cache()
        assert check.status is Status.WARN
        assert check.detail.endswith(f": {tmp_path / link} is a link to nothing")
        assert "remove the link" in check.next_step
        assert "the argument cache_dir" in check.next_step
    with override(cache_dir=tmp_path / "link"):
        assert f"make the folder {tmp_path / 'nothing'}," in _doctor._cache().next_step
        (tmp_path / "nothing").mkdir(mode=0o700)
        assert _doctor._cache().status is Status.OK


def test_doctor_on_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with override(lock_dir=tmp_path / "locks"):
        assert _doctor._locks().status is Status.OK
    (tmp_path / "file").write_text("")
    with override(lock_dir=tmp_path / "file" / "below"):
        broken = _doctor._locks()
    assert (broken.status, "MEGAMOE_JIT_LOCK_DIR" in broken.next_step) == ("warn", True)
    monkeypatch.setattr(_doctor, "file_system", lambda _: _machine.FileSystem("/", "nfs", True, None))
    with override(lock_dir=tmp_path / "locks"):
        assert _doctor._locks().status is Status.WARN


@pytest.mark.parametrize(
    ("environ", "code", "failing"),
    [
        ({"MEGAMOE_JIT_NVRTC": "/nonexistent/libnvrtc.so"}, 3, {"compiler", "trial compile"}),
        ({"MEGAMOE_JIT_STRICT": "maybe"}, 3, {"settings"}),
    ],
    ids=["compiler", "settings"],
)
def test_doctor_reports_and_ends_with_3(environ: dict[str, str], code: int, failing: set[str]):
    done = run("doctor", "--json", **environ)
    assert done.returncode == code
    doc = checked(done.stdout)
    assert doc["status"] == "fail"
    assert {check["name"] for check in doc["checks"] if check["status"] == "fail"} == failing
    assert all(check["next_step"] for check in doc["checks"] if check["status"] != "ok")


def test_doctor_ends_with_0_or_1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_doctor, "gpus", lambda: Machine("13.0", None, (H200,)))
    monkeypatch.setattr("megamoe_jit._compile.toolchain.installed_torch_cuda", lambda: "12.8")
    monkeypatch.setattr("megamoe_jit._compile.toolchain.wanted_major", lambda: (None, "nothing asks for one"))
    fine = invoke("doctor")
    assert fine.exit_code == 0, fine.stdout
    assert {line[:4] for line in fine.stdout.splitlines() if not line.startswith(" ")} == {"ok  "}
    monkeypatch.setenv("MEGAMOE_JIT_CACHE_DIRR", "/x")
    warned = invoke("doctor", "--no-trial")
    assert warned.exit_code == 1
    assert "MEGAMOE_JIT_CACHE_DIRR" in warned.stdout


def test_doctor_survives_what_it_looks_for(monkeypatch: pytest.MonkeyPatch):
    def explode() -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(_doctor, "_tools", explode)
    checks = {check.name: check for check in _doctor.examine(trial=False)}
    assert checks["tools"].status is Status.FAIL
    assert "surprise" in checks["tools"].detail
    assert checks["locks"].name == "locks"


def test_file_systems(monkeypatch: pytest.MonkeyPatch):
    mounts = (
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:40 / /mnt/shared\\040files rw - nfs4 server:/ rw\n"
        "3 1 0:41 / /mnt/scratch rw shared:1 - lustre x rw\n"
    )
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: mounts if str(self).endswith("mountinfo") else read(self, *a, **k)
    )
    assert _machine._mount_of("/mnt/shared files/x") == ("/mnt/shared files", "nfs4")
    assert _machine._mount_of("/mnt/scratch") == ("/mnt/scratch", "lustre")
    assert _machine._mount_of("/mnt/scratches") == ("/", "ext4")
    found = _machine.file_system(Path("/nonexistent/deeper"))
    assert (found.mount, found.type, found.network) == ("/", "ext4", False)
    assert all(_machine._NETWORK.search(kind) for kind in ("nfs", "nfs4", "cifs", "fuse.sshfs", "lustre", "9p"))
    assert not any(_machine._NETWORK.search(kind) for kind in ("ext4", "xfs", "tmpfs", "overlay", "btrfs", "zfs"))


def test_documents_go_to_standard_output_alone():
    done = run("doctor", "--no-trial", "--json")
    assert json.loads(done.stdout)["kind"] == "doctor"
    assert done.stderr.splitlines()[-1].count(",") == 2


def doctor(*words: str, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks by name, of a new process."""
    done = run("doctor", "--json", *words, **environ)
    return done.returncode, {check["name"]: check for check in checked(done.stdout)["checks"]}


def with_config(folder: Path, text: str) -> dict[str, str]:
    """The environment of a user whose own settings file, named by nothing, holds this text."""
    path = folder / "megamoe-jit" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return {"XDG_CONFIG_HOME": str(folder), "MEGAMOE_JIT_CONFIG": ""}


def test_doctor_names_what_the_settings_file_sets(tmp_path: Path):
    environ = with_config(tmp_path, "strict = 'warn'\njobs = 2\nlock_dir = '/proc/locks'\nreadonly_cache = '/none'\n")
    file = tmp_path / "megamoe-jit" / "config.toml"
    _, checks = doctor("--no-trial", **environ)
    settings = checks["settings"]
    assert (settings["status"], settings["detail"].endswith(f"jobs, lock_dir, readonly_cache, strict from {file}")) == (
        "ok",
        True,
    )
    assert settings["data"]["file"] == str(file)
    assert settings["data"]["from_file"] == ["jobs", "lock_dir", "readonly_cache", "strict"]
    assert checks["read-only"]["next_step"].startswith(f"correct readonly_cache in the settings file {file}; ")
    assert checks["locks"]["next_step"].startswith(f"set lock_dir in the settings file {file} to ")
    _, named = doctor("--no-trial", **environ, MEGAMOE_JIT_READONLY_CACHE="/none")
    assert named["read-only"]["next_step"].startswith("correct MEGAMOE_JIT_READONLY_CACHE; ")


def test_doctor_names_what_the_settings_file_holds_to_no_effect(tmp_path: Path):
    environ = with_config(tmp_path, "job = 3\njobs = 2\n[tool.megamoe-jit]\njobs = 4\n")
    code, checks = doctor("--no-trial", **environ, MEGAMOE_JIT_ZZZ="1")
    settings = checks["settings"]
    assert (code, settings["status"]) == (1, "warn")
    assert settings["data"]["unknown"] == ["MEGAMOE_JIT_ZZZ", "job"]
    file = tmp_path / "megamoe-jit" / "config.toml"
    assert settings["detail"].splitlines() == [
        "unknown variables are ignored: MEGAMOE_JIT_ZZZ",
        f"ignored in {file}: job (did you mean jobs?), jobs (tool.megamoe-jit.jobs wins)",
    ]
    assert f"correct {file}" in settings["next_step"]


@pytest.mark.parametrize(
    ("text", "variable", "step"),
    [
        ("jobs = 0", {}, "correct that file"),
        ("", {"MEGAMOE_JIT_CONFIG": "/none.toml"}, "correct that file, or correct or unset MEGAMOE_JIT_CONFIG"),
        ("", {"MEGAMOE_JIT_JOBS": "0"}, "correct or unset MEGAMOE_JIT_JOBS"),
    ],
    ids=["file", "name of the file", "variable"],
)
def test_doctor_says_where_a_setting_is_to_be_corrected(tmp_path: Path, text: str, variable: dict[str, str], step: str):
    code, checks = doctor(**{**with_config(tmp_path, text), **variable})
    assert (code, checks["settings"]["next_step"]) == (3, step)


def test_doctor_names_every_setting_that_is_not_allowed(tmp_path: Path):
    variables = {"MEGAMOE_JIT_STRICT": "maybe", "MEGAMOE_JIT_DEBUG": "2"}
    code, checks = doctor(**with_config(tmp_path, "jobs = 0\ntimeout_s = true"), **variables)
    settings = checks["settings"]
    assert (code, settings["status"], list(checks)) == (3, "fail", ["settings"])
    problems = [problem["message"] for problem in settings["data"]["problems"]]
    assert settings["detail"].splitlines() == problems
    assert [problem["field"] for problem in settings["data"]["problems"]] == ["strict", "debug", "jobs", "timeout_s"]
    assert problems[0] == "MEGAMOE_JIT_STRICT='maybe' is not allowed; allowed: error, warn, ignore"
    assert settings["next_step"] == "correct or unset MEGAMOE_JIT_STRICT, MEGAMOE_JIT_DEBUG; correct that file"


@pytest.mark.parametrize("origin", ["variable", "file"])
def test_doctor_fails_where_no_kernel_can_be_rendered(tmp_path: Path, origin: str):
    environ = {"MEGAMOE_JIT_KERNELS_SRC": str(tmp_path)}
    place = "MEGAMOE_JIT_KERNELS_SRC"
    if origin == "file":
        environ = with_config(tmp_path / "config", f"kernels_src = '{tmp_path}'\n")
        place = f"kernels_src in the settings file {tmp_path}/config/megamoe-jit/config.toml"
    code, checks = doctor("--no-trial", **environ)
    assert (code, checks["sources"]["status"]) == (3, "fail")
    assert "kernel template 'kernels/entry.cuh.j2' does not exist" in checks["sources"]["detail"]
    assert checks["sources"]["next_step"].startswith(f"correct {place}: ")
    write_rooms(tmp_path)
    assert doctor("--no-trial", **environ)[1]["sources"]["status"] == "ok"
