"""The cache on disk: entries are whole or absent, damage heals, failures only warn."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe_jit import _entry, _locks, _store
from megamoe_jit._cache import KernelCache
from megamoe_jit._locks import private_directory
from tests.stubs import KEY, OTHER, REPO, fake_cubin, rewrite_meta

IS_ROOT = os.geteuid() == 0


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_importing_the_cache_is_cheap():
    code = (
        "import sys, megamoe_jit._cache; print([m for m in ('torch', 'cuda.bindings', 'jinja2') if m in sys.modules])"
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


def damage_truncate(folder):
    path = folder / "kernel.cubin"
    path.write_bytes(path.read_bytes()[:-1])


def damage_garble(folder):
    path = folder / "kernel.cubin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def damage_meta(folder):
    (folder / "meta.json").write_text("{")


def damage_list(folder):
    (folder / "meta.json").write_text("[]")


def damage_no_cubin(folder):
    (folder / "kernel.cubin").unlink()


def damage_no_meta(folder):
    (folder / "meta.json").unlink()


def damage_other_key(folder):
    rewrite_meta(folder, key="f" * 64)


def damage_other_arch(folder):
    rewrite_meta(folder, arch="sm_100a")


def damage_no_elf(folder):
    (folder / "kernel.cubin").write_bytes(b"not an ELF")
    rewrite_meta(folder, cubin_bytes=10, cubin_sha256=hashlib.sha256(b"not an ELF").hexdigest())


def damage_link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def damage_file(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("not a directory")


def damage_writable_by_others(folder):
    (folder / "kernel.cubin").chmod(0o666)


def damage_writable_directory(folder):
    folder.chmod(0o777)


def damage_oversize(folder):
    os.truncate(folder / "kernel.cubin", _entry.LIMIT + 1)


def damage_wrong_owner(folder):
    if not IS_ROOT:
        pytest.skip("only root can give a file away")
    os.chown(folder / "kernel.cubin", 4321, 4321)


def damage_wrong_owner_of_directory(folder):
    if not IS_ROOT:
        pytest.skip("only root can give a directory away")
    os.chown(folder, 4321, 4321)


DAMAGES = [function for name, function in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_quarantined_with_one_warning_and_heals(cache, warnings, damage):
    cache.store(KEY, fake_cubin(), "", {})
    damage(cache.entry_path(KEY))
    assert cache.load(KEY) is None
    assert len(warnings) == 1
    assert str(cache.entry_path(KEY)) in warnings[0].getMessage()
    assert cache.load(KEY) is None
    assert len(warnings) == 1
    assert [p.name[:64] for p in (cache.path / "quarantine").iterdir()] == [KEY]
    assert cache.store(KEY, fake_cubin(), "", {})
    assert cache.load(KEY) is not None


def test_damage_that_cannot_be_moved_warns_once(cache, warnings, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})
    damage_truncate(cache.entry_path(KEY))
    monkeypatch.setattr(_store.os, "rename", fail_with(errno.EROFS))
    assert cache.load(KEY) is None
    assert cache.load(KEY) is None
    assert len(warnings) == 1


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

    def write_half_of_the_second_file(path, data):
        calls.append(path)
        real(path, data if len(calls) == 1 else data[: len(data) // 2])
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
