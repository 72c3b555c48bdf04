"""Entries that are there and must not be used: each kind is put aside with one warning, and compiled again."""

from __future__ import annotations

import errno
import hashlib
import os
import time

import pytest

from megamoe_jit._cache import entry as _entry
from megamoe_jit._cache import store as _store
from tests.stubs import KEY, fail_with, fake_cubin, rewrite_meta

IS_ROOT = os.geteuid() == 0


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


def damage_file_is_a_pipe(folder):
    (folder / "kernel.cubin").unlink()
    os.mkfifo(folder / "kernel.cubin", 0o600)


def damage_file_is_a_directory(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.json").mkdir(mode=0o700)


def damage_file_is_a_link(folder):
    (folder / "kernel.cubin").rename(folder / "elsewhere")
    (folder / "kernel.cubin").symlink_to("elsewhere")


def damage_deep_meta(folder):
    (folder / "meta.json").write_text("[" * 100_000)


def damage_meta_of_another_kind(folder):
    rewrite_meta(folder, nvrtc="12.9")


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


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_file_that_cannot_be_read_is_damage(cache, warnings, monkeypatch, number):
    """A bad block or a wrong mode would fail in the same way for ever."""
    cache.store(KEY, fake_cubin(), "", {})
    real = os.open

    def refuse(path, *arguments, **named):
        if path == "kernel.cubin":
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(_entry.os, "open", refuse)
        assert cache.load(KEY) is None
    assert len(warnings) == 1
    assert os.strerror(number) in warnings[0].getMessage()
    assert len(cache.quarantined()) == 1
    assert cache.store(KEY, fake_cubin(), "", {})
    assert cache.load(KEY) is not None


def test_quarantine_does_not_grow_for_ever(cache, monkeypatch):
    monkeypatch.setattr(_store, "QUARANTINED", 3)
    for number in range(5):
        cache.store(KEY, fake_cubin(bytes([number])), "", {})
        assert cache.quarantine(KEY)
        time.sleep(0.005)
    kept = {path.read_bytes()[-1] for path in (cache.path / "quarantine").glob("*/kernel.cubin")}
    assert kept == {2, 3, 4}


def test_damage_that_cannot_be_moved_warns_once(cache, warnings, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})
    damage_truncate(cache.entry_path(KEY))
    monkeypatch.setattr(_store.os, "rename", fail_with(errno.EROFS))
    assert cache.load(KEY) is None
    assert cache.load(KEY) is None
    assert len(warnings) == 1
