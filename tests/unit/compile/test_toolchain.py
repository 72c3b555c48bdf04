"""Choosing NVRTC: explicit, then torch's major, then that of cuda-bindings; and identifying it exactly."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import signal
import struct
import sys
import types
from pathlib import Path

import pytest

from megamoe_jit._compile import build_id as _build_id
from megamoe_jit._compile import toolchain as _toolchain
from megamoe_jit._compile.build_id import build_id
from megamoe_jit._compile.toolchain import activate, candidates, find_toolchain, wanted_major
from megamoe_jit._errors import ToolchainError
from megamoe_jit._settings.settings import override


@pytest.fixture(autouse=True)
def forget_choice():
    _toolchain._find_once.cache_clear()
    yield
    _toolchain._find_once.cache_clear()


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(_toolchain, "installed_torch_cuda", lambda: None)


@pytest.fixture
def two_wheels(tmp_path, monkeypatch, no_torch):
    """A Python path with a CUDA 13 and a CUDA 12 wheel, and nothing else anywhere."""

    def make(folder, name, builtins, content):
        path = tmp_path / folder
        path.mkdir(parents=True)
        (path / name).write_bytes(content)
        (path / builtins).write_bytes(b"")
        return path / name

    thirteen = make("nvidia/cu13/lib", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0", b"thirteen")
    twelve = make("nvidia/cuda_nvrtc/lib", "libnvrtc.so.12", "libnvrtc-builtins.so.12.9", b"twelve")
    places = [(thirteen, "wheel"), (twelve, "wheel")]
    monkeypatch.setattr(_toolchain, "_search", lambda: iter(places))
    return thirteen, twelve


def set_bindings(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


def set_torch(monkeypatch, cuda):
    module = types.ModuleType("torch")
    module.version = types.SimpleNamespace(cuda=cuda)
    monkeypatch.setitem(sys.modules, "torch", module)


@pytest.mark.parametrize(("version", "index"), [("12.9.4", 1), ("13.0.3", 0)])
def test_bindings_decide_without_torch(two_wheels, monkeypatch, version, index):
    set_bindings(monkeypatch, version)
    assert find_toolchain().path == two_wheels[index]
    assert [c.path for c in candidates()][0] == two_wheels[index]
    assert len(candidates()) == 2


def test_imported_torch_decides(two_wheels, monkeypatch):
    set_bindings(monkeypatch, "13.4.4")
    set_torch(monkeypatch, "12.8")
    assert find_toolchain().path == two_wheels[1]
    assert find_toolchain().version == (12, 9)


def test_torch_for_cpu_leaves_it_to_bindings(two_wheels, monkeypatch):
    set_bindings(monkeypatch, "13.4.4")
    set_torch(monkeypatch, None)
    assert wanted_major()[0] == 13


def test_installed_torch_is_read_not_imported(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert wanted_major()[0] == 13
    assert "torch" not in sys.modules


def test_other_major_is_used_with_a_warning(two_wheels, monkeypatch, caplog):
    set_bindings(monkeypatch, "13.4.4")
    monkeypatch.setattr(_toolchain, "_search", lambda: iter([(two_wheels[1], "wheel")]))
    with caplog.at_level(logging.WARNING, "megamoe_jit"):
        assert find_toolchain().version == (12, 9)
    assert "may not load" in caplog.text
    assert "pip install 'nvidia-cuda-nvrtc>=13,<14'" in caplog.text


def test_explicit_path_wins(two_wheels, monkeypatch):
    set_bindings(monkeypatch, "12.9.4")
    with override(nvrtc=two_wheels[0]):
        assert find_toolchain().version == (13, 0)
        assert candidates()[0].origin == "MEGAMOE_JIT_NVRTC"
    assert find_toolchain().version == (12, 9)


def test_nothing_found_gives_the_pip_command(two_wheels, monkeypatch, tmp_path):
    set_bindings(monkeypatch, "13.0.3")
    monkeypatch.setattr(_toolchain, "_search", lambda: iter(()))
    with pytest.raises(ToolchainError, match=r"pip install 'nvidia-cuda-nvrtc>=13,<14'"):
        find_toolchain()
    with override(nvrtc=tmp_path / "none.so"), pytest.raises(ToolchainError, match="does not exist"):
        find_toolchain()


def test_too_old_is_refused(two_wheels, tmp_path):
    (two_wheels[1].parent / "libnvrtc-builtins.so.12.9").rename(two_wheels[1].parent / "libnvrtc-builtins.so.12.2")
    with override(nvrtc=two_wheels[1]), pytest.raises(ToolchainError, match=r"NVRTC 12\.2 .* too old"):
        find_toolchain()


def test_symbolic_links_are_one_candidate(two_wheels, monkeypatch, tmp_path):
    link = tmp_path / "libnvrtc.so.12"
    link.symlink_to(two_wheels[1])
    monkeypatch.setattr(_toolchain, "_search", lambda: iter([(two_wheels[1], "wheel"), (link, "system")]))
    assert [c.path for c in candidates()] == [two_wheels[1]]


def test_not_a_library_is_refused(tmp_path, no_torch):
    path = tmp_path / "libnvrtc.so.12"
    path.write_bytes(b"not an ELF")
    with override(nvrtc=path), pytest.raises(ToolchainError, match="not a usable NVRTC"):
        find_toolchain()


def test_build_id_note_and_fallback(tmp_path):
    path = tmp_path / "x.so"
    path.write_bytes(b"no elf at all")
    assert build_id(path) == "sha256:" + hashlib.sha256(b"no elf at all").hexdigest()
    note = struct.pack("<III", 4, 4, 3) + b"GNU\0" + b"\xde\xad\xbe\xef"
    other = struct.pack("<III", 3, 2, 3) + b"XX\0\0" + b"\1\2\0\0"
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    body = other + note
    program = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(body), 0, 0)
    path.write_bytes(bytes(header) + program + body)
    assert build_id(path) == "deadbeef"


def test_the_real_one_loads_and_is_what_calls_reach():
    toolchain = find_toolchain()
    assert toolchain.version >= _toolchain.MINIMUM
    assert toolchain.path.is_file()
    assert len(bytes.fromhex(toolchain.build.removeprefix("sha256:"))) >= 8  # old ones carry no build id
    activate(toolchain)
    mapped = {path for path, _ in _toolchain._loaded()}
    assert any(os.path.samefile(toolchain.path, path) for path in mapped)
    assert find_toolchain() is toolchain


def test_another_nvrtc_in_the_process_is_reported(tmp_path):
    real = find_toolchain()
    activate(real)
    stranger = _toolchain.Toolchain(Path("/proc/self/exe"), real.version, "x")
    with pytest.raises(ToolchainError):
        activate(stranger)


def test_nothing_says_which_major(no_torch, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert wanted_major() == (None, "neither torch nor cuda-bindings says which")


def test_no_torch_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _toolchain.installed_torch_cuda() is None


def test_search_looks_where_libraries_are(tmp_path, monkeypatch):
    for folder in ("conda/lib", "home/lib64", "ld"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libnvrtc.so.12").write_bytes(b"")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path / 'ld'}")
    found = [(path, origin) for path, origin in _toolchain._search() if path.is_relative_to(tmp_path)]
    assert [origin for _, origin in found] == ["CONDA_PREFIX", "CUDA_HOME", "LD_LIBRARY_PATH"]


def test_process_without_maps(monkeypatch):
    def fail(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", fail)
    assert list(_toolchain._loaded()) == []


def test_version_in_the_file_name(tmp_path):
    path = tmp_path / "libnvrtc.so.12.8.93"
    path.write_bytes(b"")
    (tmp_path / "odd.so").write_bytes(b"")
    assert _toolchain._candidate(path, "x").version == (12, 8)
    assert _toolchain._candidate(tmp_path / "odd.so", "x").major == 0


def test_library_that_cannot_be_read(two_wheels, monkeypatch):
    set_bindings(monkeypatch, "12.9.4")

    def fail(path):
        raise PermissionError(f"no {path}")

    monkeypatch.setattr(_toolchain, "build_id", fail)
    with pytest.raises(ToolchainError, match="cannot read NVRTC library"):
        find_toolchain()


def test_library_that_does_not_tell_its_version(tmp_path, no_torch, monkeypatch):
    path = tmp_path / "libnvrtc.so.12"
    path.write_bytes(b"")
    for status, version in ((1, None), (0, (13, 7))):

        def tell(major, minor, status=status, version=version):
            if version:
                major._obj.value, minor._obj.value = version
            return status

        monkeypatch.setattr(_toolchain.ctypes, "CDLL", lambda _, tell=tell: types.SimpleNamespace(nvrtcVersion=tell))
        if version:
            assert _toolchain._loaded_version(path) == version
        else:
            with pytest.raises(ToolchainError, match=r"does not tell its version \(nvrtcVersion returned 1\)"):
                _toolchain._loaded_version(path)


@pytest.mark.parametrize(
    ("failure", "message"),
    [(ImportError("no module"), "cuda-python is not installed"), (RuntimeError("lost"), "cannot use NVRTC library")],
)
def test_bindings_that_do_not_load_it(monkeypatch, failure, message):
    import cuda.pathfinder

    def fail(name):
        raise failure

    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", fail)
    with pytest.raises(ToolchainError, match=message):
        _toolchain._activate(find_toolchain().path)


def test_library_that_is_not_the_one_in_use(monkeypatch, tmp_path):
    import cuda.pathfinder

    other = tmp_path / "other.so"
    other.write_bytes(b"")
    used = types.SimpleNamespace(abs_path=str(other))
    monkeypatch.setattr(cuda.pathfinder, "load_nvidia_dynamic_lib", lambda name: used)
    with pytest.raises(ToolchainError, match=f"set MEGAMOE_JIT_NVRTC={other}"):
        _toolchain._activate(find_toolchain().path)


def test_library_whose_calls_reach_another(monkeypatch):
    real = find_toolchain()
    stranger = _toolchain.Toolchain(real.path, (real.version[0], real.version[1] + 1), real.build)
    with pytest.raises(ToolchainError, match="was taken for NVRTC .*, but calls reach"):
        activate(stranger)


def test_folder_in_place_of_the_library(tmp_path):
    with override(nvrtc=tmp_path), pytest.raises(ToolchainError, match=r"\(from MEGAMOE_JIT_NVRTC\) is not a file"):
        find_toolchain()


def test_child_forked_while_a_thread_looks_for_the_compiler_can_look_too():
    with _toolchain._find_lock, _toolchain._activate_lock:
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(20)  # ends a child that waits for a thread it has not
                activate(find_toolchain())
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
    assert status == 0


def test_file_beside_the_library_that_only_looks_like_its_builtins(tmp_path, monkeypatch):
    """Package managers leave such files behind; loading one would fail."""
    real = find_toolchain().path.resolve()
    for path in (real, *real.parent.glob("libnvrtc-builtins.so.*")):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "libnvrtc-builtins.so.12.9.bak").write_text("no library")
    loaded = []
    monkeypatch.setattr(_toolchain.ctypes, "CDLL", lambda path, mode: loaded.append(Path(path).name))
    monkeypatch.setattr(_toolchain.Path, "resolve", lambda self: self)
    _toolchain._activate(tmp_path / real.name)
    assert real.name in loaded
    assert not [name for name in loaded if name.endswith(".bak")]


def test_build_id_behind_other_notes():
    """Linkers put an ABI note first."""

    def note(kind, name, body):
        return struct.pack("<III", len(name), len(body), kind) + name + body

    notes = note(1, b"GNU\0", bytes(16)) + note(3, b"xyz\0", bytes(4))
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 2)
    last = note(3, b"GNU\0", b"\xab\xcd\xef\x01")
    begin = 64 + 2 * 56
    programs = struct.pack("<IIQQQQQQ", 4, 0, begin, 0, 0, len(notes), 0, 0)
    programs += struct.pack("<IIQQQQQQ", 4, 0, begin + len(notes), 0, 0, len(last), 0, 0)
    assert _build_id._build_id_note(bytes(header) + programs + notes + last) == b"\xab\xcd\xef\x01"


def test_elf_without_a_build_id(tmp_path):
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    program = struct.pack("<IIQQQQQQ", 1, 0, 120, 0, 0, 0, 0, 0)
    (tmp_path / "x.so").write_bytes(bytes(header) + program)
    assert build_id(tmp_path / "x.so").startswith("sha256:")
