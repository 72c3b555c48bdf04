"""Which ranks can share memory: what a process says of its place, and what of that is refused."""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._device import nvml as _nvml
from megamoe_jit._errors import MegaMoeError
from megamoe_jit._layer import symmetric as _symmetric
from megamoe_jit._layer.symmetric import Place

HERE = Place("boot", "node", 7, "/tmp", (1, 2), "gpu-0", 0)
THERE = replace(HERE, process=8, gpu="gpu-1", index=1)
ONE, OTHER = "11111111-0000", "22222222-0000"


def test_ranks_of_one_host_may_share_memory_whatever_their_hosts_are_called():
    _symmetric._refuse_places([HERE, THERE])
    _symmetric._refuse_places([HERE, replace(THERE, host_name="container", index=0)])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            {"host": "another boot"},
            "different hosts (rank 0: node (boot id boot), rank 1: node (boot id another boot))",
        ),
        ({"gpu": "gpu-0"}, "share a GPU (rank 0: gpu-0, rank 1: gpu-0)"),
        ({"directory_id": (1, 3)}, "different temporary directories (rank 0: /tmp, rank 1: /tmp)"),
        ({"directory_id": None, "directory": "/none"}, "different temporary directories (rank 0: /tmp, rank 1: /none)"),
        ({"process": 7}, "one process number (rank 0: 7, rank 1: 7)"),
        ({"directory": "/" + 97 * "x"}, "is too long; allowed: 107 bytes"),
    ],
)
def test_what_keeps_ranks_from_sharing_memory_is_named(other: dict, says: str):
    with pytest.raises(MegaMoeError) as caught:
        _symmetric._refuse_places([HERE, replace(THERE, **other)])
    assert says in str(caught.value)
    assert "; allowed: " in str(caught.value)


def test_a_socket_of_the_longest_name_is_taken():
    _symmetric._refuse_places([HERE, replace(THERE, directory="/" + 95 * "x")])


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The UUIDs of the visible GPUs; 0 and 1 are peers of each other alone."""
    found = ["GPU-a", "b", "c"]
    for name, stand_in in (
        ("device_count", lambda: len(found)),
        ("get_device_properties", lambda at: SimpleNamespace(uuid=found[getattr(at, "index", at)])),
        ("can_device_access_peer", lambda device, index: {device.index, index} == {0, 1}),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


def test_a_place(gpus: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in _symmetric._TEMPORARY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEMP", "/nonexistent")
    boot = tmp_path / "boot_id"
    boot.write_text("0123-4567\n")
    monkeypatch.setattr(_symmetric, "_BOOT_ID", boot)
    found, name = _symmetric._here(torch.device("cuda", 0)), socket.gethostname()
    assert found == Place("0123-4567", name, os.getpid(), "/nonexistent", None, "a", 0)
    monkeypatch.setenv("TMP", str(tmp_path))
    found = _symmetric._here(torch.device("cuda", 2))
    assert (found.directory, found.gpu, found.index) == (str(tmp_path), "c", 2)
    assert found.directory_id == (tmp_path.stat().st_dev, tmp_path.stat().st_ino)
    for broken in (b"", b"\xff"):
        boot.write_bytes(broken)
        assert _symmetric._here(torch.device("cuda", 0)).host == name
    boot.unlink()
    assert _symmetric._here(torch.device("cuda", 0)).host == name


def test_access_is_asked_of_cuda_for_visible_gpus_and_of_nvml_for_others(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr(_symmetric, "peer_access", lambda *uuids: asked.append(uuids))
    device = torch.device("cuda", 0)
    assert [_symmetric._reaches(device, uuid) for uuid in ("b", "c", "d")] == [True, False, None]
    assert asked == [("a", "d")]


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_torchs_variable_is_set_while_it_is_needed_and_put_back(monkeypatch: pytest.MonkeyPatch, before: str | None):
    name = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    seen = []

    def fail() -> None:
        with _symmetric.variable_set(name, "1"):
            seen.append(libc.getenv(name.encode()))  # as torch asks
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, fail)
    assert seen == [b"1"]
    assert os.environ.get(name) == before
    assert libc.getenv(name.encode()) == (None if before is None else before.encode())


class Nvml:
    """NVML with two GPUs."""

    def __init__(self, statuses: dict[int, int], error: int = 0) -> None:
        self.statuses, self.error, self.open = statuses, error, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: object) -> int:
        known = [f"GPU-{each}".encode() for each in (ONE, OTHER)]
        if uuid not in known:
            return 6  # not found
        handle._obj.value = 100 + known.index(uuid)
        return 0

    def nvmlDeviceGetP2PStatus(self, one: object, other: object, capability: int, status: object) -> int:
        assert (one.value, other.value) == (100, 101)
        status._obj.value = self.statuses[capability]
        return self.error


@pytest.mark.parametrize(
    ("nvml", "other", "access"),
    [
        (Nvml({0: 0, 1: 0}), OTHER, True),
        (Nvml({0: 5, 1: 0}), OTHER, False),
        (Nvml({0: 0, 1: 4}), OTHER, False),
        (Nvml({0: 0, 1: 6}), OTHER, None),
        (Nvml({0: 0, 1: 0}), "elsewhere", None),
        (Nvml({0: 0, 1: 0}, error=3), OTHER, None),
    ],
)
def test_what_nvml_says_of_two_gpus(monkeypatch: pytest.MonkeyPatch, nvml: Nvml, other: str, access: bool | None):
    monkeypatch.setattr(_nvml.ctypes, "CDLL", lambda name: nvml)
    assert _nvml.peer_access(ONE, other) is access
    assert nvml.open == 0


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    for library in (missing, lambda name: SimpleNamespace(), lambda name: SimpleNamespace(nvmlInit_v2=lambda: 999)):
        monkeypatch.setattr(_nvml.ctypes, "CDLL", library)
        assert _nvml.peer_access(ONE, OTHER) is None
