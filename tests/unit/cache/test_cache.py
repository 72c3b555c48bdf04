"""The cache on disk: entries are whole or absent, damage heals, failures only warn."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megamoe_jit._cache import entry as _entry
from megamoe_jit._cache import locks as _locks
from megamoe_jit._cache import store as _store
from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._trust import private_directory
from tests.stubs import KEY, OTHER, REPO, fail_with, fake_cubin, rewrite_meta


def test_importing_the_cache_is_cheap():
    code = (
        "import sys, megamoe_jit._cache.cache; "
        "print([m for m in ('torch', 'cuda.bindings', 'jinja2') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == "[]"


def test_store_then_load(cache, warnings):
    cubin = fake_cubin()
    assert cache.load(KEY) is None
    assert cache.store(KEY, cubin, "source\n", {"registers": 168})
    entry = cache.load(KEY)
    assert (entry.key, entry.cubin) == (KEY, cubin)
    assert entry.path == cache.root / "v1" / "ab" / KEY
    assert {p.name for p in entry.path.iterdir()} == {"kernel.cubin", "meta.json", "kernel.cu"}
    assert (entry.path / "kernel.cu").read_text() == "source\n"
    assert entry.meta["registers"] == 168
    assert (entry.meta["schema"], entry.meta["key"], entry.meta["arch"]) == (1, KEY, "sm_90a")
    assert entry.meta["cubin_bytes"] == len(cubin)
    assert list((cache.path / ".tmp").iterdir()) == []
    assert not warnings
    for folder in (cache.root, cache.path, cache.path / "ab", entry.path):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in entry.path.iterdir()} == {0o600}


def test_losing_the_race_is_silent(cache, warnings):
    assert cache.store(KEY, fake_cubin(b"first"), "", {})
    assert cache.store(KEY, fake_cubin(b"second"), "", {})
    assert cache.load(KEY).cubin.endswith(b"first")
    assert list((cache.path / ".tmp").iterdir()) == []
    assert not warnings


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST])
def test_loser_of_the_race_need_not_see_the_winner(cache, warnings, monkeypatch, number):
    """A network file system may refuse the rename and deny for a minute that there is anything."""
    monkeypatch.setattr(_store.os, "rename", fail_with(number))
    assert cache.store(KEY, fake_cubin(), "", {}) is True
    assert cache.load(KEY) is None
    assert list((cache.path / ".tmp").iterdir()) == []
    assert not warnings


def test_another_version_that_keeps_writing_its_own_entry_wins(cache, warnings, monkeypatch):
    """Two versions of the package on one cache: the loser uses its own bytes, and says nothing."""
    cache.store(KEY, fake_cubin(b"theirs"), "", {})
    rewrite_meta(cache.entry_path(KEY), schema=99)
    real = cache.quarantine

    def put_back(key):
        moved = real(key)
        ours = KernelCache(cache.root)
        assert ours.store(key, fake_cubin(b"theirs"), "", {})
        rewrite_meta(ours.entry_path(key), schema=99)
        return moved

    monkeypatch.setattr(cache, "quarantine", put_back)
    assert cache.store(KEY, fake_cubin(b"ours"), "", {}) is True
    assert cache.load(KEY) is None
    assert list((cache.path / ".tmp").iterdir()) == []
    assert not warnings


def test_unknown_schema_is_a_miss_and_makes_way_for_a_new_entry(cache, warnings):
    cache.store(KEY, fake_cubin(b"old"), "", {})
    rewrite_meta(cache.entry_path(KEY), schema=99)
    assert cache.load(KEY) is None
    assert cache.entry_path(KEY).is_dir()
    assert cache.entries() == []
    assert cache.store(KEY, fake_cubin(b"new"), "", {})
    assert cache.load(KEY).cubin.endswith(b"new")
    assert not warnings


def test_unusable_root_warns_once(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "root")
    assert cache.load(KEY) is None
    read = len(warnings)
    assert read <= 1
    assert cache.store(KEY, fake_cubin(), "", {}) is False
    assert cache.store(KEY, fake_cubin(), "", {}) is False
    assert len(warnings) == read + 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EXDEV])
@pytest.mark.parametrize("step", ["mkdir", "write", "fsync", "rename"])
def test_disk_that_fails_in_the_middle_of_a_publish_leaves_nothing(cache, warnings, monkeypatch, step, number):
    cache.store(OTHER, fake_cubin(), "", {})
    real, calls = _store._write, []

    def write_half_of_the_second_file(path, data, mode):
        calls.append(path)
        real(path, data if len(calls) == 1 else data[: len(data) // 2], mode)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(_store, "_write", write_half_of_the_second_file)
        elif step == "mkdir":
            patch.setattr(Path, "mkdir", fail_with(number))
        else:
            patch.setattr(_store.os, step, fail_with(number))
        assert cache.store(KEY, fake_cubin(), "source", {}) is False
    assert len(warnings) == 1
    assert os.strerror(number) in warnings[0].getMessage()
    assert list((cache.path / ".tmp").iterdir()) == []
    assert cache.load(KEY) is None
    assert cache.load(OTHER) is not None


def test_directory_that_cannot_be_synchronised_is_no_failure(cache, warnings, monkeypatch):
    monkeypatch.setattr(_store.os, "O_DIRECTORY", 0o7777777)
    assert cache.store(KEY, fake_cubin(), "", {}) is True
    assert not warnings


def test_stale_handle_is_a_silent_miss(cache, warnings, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})
    with monkeypatch.context() as patch:
        patch.setattr(_entry.os, "fstat", fail_with(errno.ESTALE))
        assert cache.load(KEY) is None
    assert not warnings
    assert cache.load(KEY) is not None


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_directory_others_may_write_is_refused(cache, warnings, mode):
    cache.store(KEY, fake_cubin(), "", {})
    cache.path.chmod(mode)
    assert cache.load(KEY) is None
    assert cache.store(KEY, fake_cubin(), "", {}) is False
    assert all("can be written by other users" in w.getMessage() for w in warnings)


@pytest.mark.parametrize("kind", ["link", "open", "another's"])
def test_temporary_cache_that_another_user_could_have_made_is_refused(tmp_path, warnings, monkeypatch, kind):
    """Where everybody may make directories; one that was named is its owner's business."""
    root, elsewhere = tmp_path / f"megamoe-jit-{os.geteuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "link":
        root.symlink_to(elsewhere)
    else:
        root.mkdir(mode=0o700)
        root.chmod(0o777 if kind == "open" else 0o700)
    if kind == "another's":
        real = os.lstat
        owned = lambda path: os.stat_result([*real(path)[:4], 4321, *real(path)[5:]])  # noqa: E731
        monkeypatch.setattr(os, "lstat", lambda path: owned(path) if Path(path) == root else real(path))
    cache = KernelCache(root)
    assert (cache.writable(), cache.store(KEY, fake_cubin(), "", {})) == (False, False)
    assert (os.listdir(root), os.listdir(elsewhere), len(warnings)) == ([], [], 1)
    assert KernelCache(elsewhere).store(KEY, fake_cubin(), "", {}) is True


def test_directory_of_someone_else_is_refused(tmp_path, monkeypatch):
    private_directory(tmp_path / "mine")
    real = os.lstat(tmp_path / "mine")
    monkeypatch.setattr(_locks.os, "geteuid", lambda: real.st_uid + 1)
    fields = list(real)
    fields[4] = 4321
    monkeypatch.setattr(_locks.os, "lstat", lambda path: os.stat_result(fields))
    with pytest.raises(PermissionError, match="belongs to user 4321"):
        private_directory(tmp_path / "mine")


def test_symbolic_link_is_refused_inside_but_fine_as_root(tmp_path, warnings):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="not a directory"):
        private_directory(tmp_path / "link")
    cache = KernelCache(tmp_path / "link")
    assert cache.store(KEY, fake_cubin(), "", {})
    assert cache.load(KEY) is not None
    assert KernelCache(tmp_path / "real").load(KEY) is not None
    assert not warnings
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert KernelCache(tmp_path / "dangling").store(KEY, fake_cubin(), "", {}) is False
    assert len(warnings) == 1


def test_use_is_noted_at_most_hourly(cache):
    cache.store(KEY, fake_cubin(), "", {})
    meta = cache.entry_path(KEY) / "meta.json"
    for age, touched in ((60, False), (7200, True)):
        stamp = time.time() - age
        os.utime(meta, (stamp, stamp))
        cache.load(KEY)
        assert (meta.stat().st_mtime > stamp + 1) is touched
    cache.touch(OTHER)


def test_left_over_staging_is_swept(cache):
    cache.store(KEY, fake_cubin(), "", {})
    for name, age in (("old", 7200), ("young", 60)):
        folder = cache.path / ".tmp" / name
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    cache.store(OTHER, fake_cubin(), "", {})
    assert [p.name for p in (cache.path / ".tmp").iterdir()] == ["young"]


@pytest.mark.parametrize(
    ("major", "expected"),
    [
        (12, ["12.10", "12.9", "11.8", "13.1"]),
        (13, ["13.1", "12.10", "12.9", "11.8"]),
        (11, ["11.8", "13.1", "12.10", "12.9"]),
        (None, ["13.1", "12.10", "12.9", "11.8"]),
    ],
)
def test_kernels_handed_over_are_taken_by_cuda_major_and_the_newest_first(tmp_path, major, expected):
    """An older compiler's kernel loads on a newer driver, but hardly the reverse."""
    versions = ["12.9", "13.1", "11.8", "12.10"]
    for number, version in enumerate(versions):
        meta = {"source_id": "one", "nvrtc": {"version": version}}
        KernelCache(tmp_path).store(f"{number:064x}", fake_cubin(version.encode()), "", meta)
    found = KernelCache(tmp_path, read_only=True).of_source("one", major)
    assert [versions[int(info.key, 16)] for info in found] == expected


def test_threads_that_ask_at_once_find_what_was_handed_over(tmp_path, monkeypatch):
    """The second one asks while the first has read one of two entries."""
    for number, source in enumerate(("one", "two")):
        meta = {"source_id": source, "nvrtc": {"version": "13.0"}}
        KernelCache(tmp_path).store(f"{number:064x}", fake_cubin(source.encode()), "", meta)
    cache = KernelCache(tmp_path, read_only=True)
    whole, asking, found = cache.entries(), [True], []

    def slow_entries(_):
        yield whole[0]
        if asking.pop():
            asking.append(False)
            other = threading.Thread(target=lambda: found.extend(cache.of_source("two")))
            other.start()
            other.join()
        yield whole[1]

    monkeypatch.setattr(cache, "entries", slow_entries)
    assert cache.of_source("one") == whole[:1]
    assert found == whole[1:]


def test_removing_from_no_cache_makes_none(tmp_path):
    """With umask 002 it would be one that others may write to, and that is never used again."""
    before = os.umask(0o002)
    try:
        cache = KernelCache(tmp_path / "cache")
        assert cache.remove(["0" * 64]).removed == ()
        assert not cache.root.exists()
        assert cache.store("0" * 64, fake_cubin(b"code"), "", {})
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (cache.root, cache.path, cache.path / "00")} == {"0o700"}
    assert cache.load("0" * 64) is not None
