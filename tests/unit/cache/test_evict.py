"""Looking after a cache: listing, finding, pruning, verifying."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time

import pytest

from megamoe_jit._cache import cache as _cache
from megamoe_jit._cache import entry as _entry
from megamoe_jit._cache import evict as _evict
from megamoe_jit._cache import store as _store
from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cache.documents import Entry, Statistics
from megamoe_jit._cache.entry import EntryInfo
from megamoe_jit._cache.locks import try_lock
from megamoe_jit._cache.trees import tree_bytes
from megamoe_jit._compile.toolchain import current_builder
from megamoe_jit._documents import time_of
from megamoe_jit._errors import ConfigError, ToolchainError
from megamoe_jit._jit.lookup import find_key
from megamoe_jit._settings.settings import Settings, override
from megamoe_jit._settings.variables import parse_size
from tests.stubs import KEY, OTHER, fake_cubin, fake_kernel, rewrite_meta
from tests.unit.cli.test_cli_refusals import ordinary


@pytest.fixture(autouse=True)
def locks_here(tmp_path):
    with override(lock_dir=tmp_path / "locks"):
        yield


def key_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def fill(cache, ages, size=1000, **meta):
    """One entry of about `size` bytes for each age in seconds since its last use; their keys."""
    keys = [key_of(n) for n in range(len(ages))]
    for key, age in zip(keys, ages, strict=True):
        cache.store(key, fake_cubin(bytes(size)), "source", {"entry": f"kernel_{age}", **meta})
        stamp = time.time() - age
        os.utime(cache.entry_path(key) / "meta.json", (stamp, stamp))
    return keys


def left(cache):
    return {info.key for info in cache.entries()}


def test_entries(cache):
    cache.store(KEY, fake_cubin(), "abc", {"entry": "one", "nvrtc": {"version": "12.9"}})
    cache.store(OTHER, fake_cubin(), "abc", {"entry": "two"})
    for name in ("2" * 64, "short"):
        (cache.path / "cd" / name).mkdir()
    (cache.path / "file").write_text("")
    first, second = sorted(cache.entries(), key=lambda info: info.entry)
    assert (first.key, first.entry, first.compiler, first.path) == (KEY, "one", "12.9", cache.entry_path(KEY))
    assert (second.key, second.entry, second.compiler) == (OTHER, "two", "")
    assert first.disk_bytes == sum(p.stat().st_size for p in first.path.iterdir())
    assert first.created_at.endswith("Z")
    assert first.used_at == pytest.approx(time.time(), abs=60)
    document = Entry.of(first)
    assert (document.key, document.path, document.entry, document.used_at) == (
        *(KEY, str(first.path), "one"),
        time_of(first.used_at),
    )
    rewrite_meta(cache.entry_path(KEY), cubin_bytes="many")
    assert [info.key for info in cache.entries()] == [OTHER]
    rewrite_meta(cache.entry_path(OTHER), nvrtc="12.9")
    assert cache.entries() == []
    assert KernelCache(cache.root / "none").entries() == []


def test_a_key_is_found_by_a_unique_prefix(cache):
    twin = KEY[:20] + "f" * 44
    for key in (KEY, OTHER, twin):
        cache.store(key, fake_cubin(), "", {})
    assert find_key("CD ", [cache]).key == OTHER
    assert find_key(KEY, [cache]).key == KEY
    with pytest.raises(ConfigError, match=r"'ab00' is not unique in .*: ab0000000000, ab0000000000"):
        find_key("ab00", [cache])
    for prefix in ("ef", "", "not hex"):
        with pytest.raises(ConfigError, match="is not in the cache .*; `megamoe-jit cache ls`"):
            find_key(prefix, [cache])
    rewrite_meta(cache.entry_path(OTHER), schema=2)
    with pytest.raises(ConfigError, match="has no readable metadata"):
        find_key("cd", [cache])
    (cache.entry_path(OTHER) / "meta.json").unlink()
    assert find_key("cd", [cache]).info is None  # damaged


def test_remove(cache, warnings, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})
    cache.store(OTHER, fake_cubin(), "", {})
    size = tree_bytes(cache.entry_path(KEY))
    report = cache.remove([KEY, key_of(1)])
    assert (report.removed, report.bytes) == ((KEY,), size)
    assert left(cache) == {OTHER}
    assert list((cache.path / ".tmp").iterdir()) == []

    def fail(*_):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(_store.os, "rename", fail)
        assert cache.remove(OTHER).removed == ()
    assert len(warnings) == 1
    assert cache.remove(OTHER).removed == (OTHER,)


def info(number, age, size=100, build="b", version="1"):
    meta = {"nvrtc": {"build": build}, "package_version": version}
    return EntryInfo(key_of(number), "/x", meta, 1e6 - age, size)


def removed(entries, **options):
    order = {key_of(n): n for n in range(20)}
    return [order[i.key] for i in _evict.to_remove(entries, now=1e6, **options)]


def test_eviction_takes_the_least_recently_used_first_and_no_young_one():
    entries = [info(0, 5000), info(1, 9000), info(2, 599), info(3, 600)]
    assert removed(entries) == []
    assert removed(entries, max_bytes=400) == []
    assert removed(entries, max_bytes=399) == [1]
    assert removed(entries, max_bytes=200) == [1, 0]
    assert removed(entries, max_bytes=0) == [1, 0, 3]
    assert removed(entries, older_than_s=5000) == [1, 0]
    assert removed(entries, older_than_s=0) == [1, 0, 3]
    assert removed(entries, older_than_s=9000, max_bytes=250) == [1, 0]


def test_eviction_takes_what_others_built_first():
    entries = [info(0, 9000), info(1, 700, build="c"), info(2, 800, version="0"), info(3, 8000)]
    entries.append(EntryInfo(key_of(4), "/x", {}, 1e6 - 650, 100))
    assert removed(entries, max_bytes=0, current=("1", "b")) == [2, 1, 4, 0, 3]
    assert removed(entries, max_bytes=0) == [0, 3, 2, 1, 4]


def test_prune(cache, monkeypatch):
    keys = fill(cache, [100, 1000, 5000, 90000])
    each = tree_bytes(cache.entry_path(keys[0]))
    assert cache.prune().removed == ()
    assert cache.prune(older_than_s=50000).removed == (keys[3],)
    cache.quarantine(keys[2])
    report = cache.prune(max_bytes=0)
    assert report.removed == (keys[1],)
    assert report.bytes == pytest.approx(2 * each, abs=20)
    assert left(cache) == {keys[0]}
    assert len(cache.quarantined()) == 0
    limited = KernelCache(cache.root, max_bytes=1)
    os.utime(cache.entry_path(keys[0]) / "meta.json", (1, 1))
    assert limited.prune().removed == (keys[0],)

    def missing():
        raise ToolchainError("none")

    monkeypatch.setattr("megamoe_jit._compile.toolchain.find_toolchain", missing)
    assert current_builder() is None
    assert cache.prune(max_bytes=0).removed == ()


def test_publish_evicts_down_to_below_the_limit(cache, caplog):
    keys = fill(cache, [7000 + 1000 * n for n in range(10)])
    each = tree_bytes(cache.entry_path(keys[0]))
    limited = KernelCache(cache.root, max_bytes=int(each * 10.5))
    with caplog.at_level(logging.INFO, "megamoe_jit"):
        assert limited.store(KEY, fake_cubin(bytes(1000)), "source", {})
    assert left(cache) == {KEY, *keys[:8]}
    assert "removed 2 least recently used kernels" in caplog.text
    assert limited.store(OTHER, fake_cubin(bytes(1000)), "source", {})
    assert left(cache) == {KEY, OTHER, *keys[:8]}


def test_young_entries_stay_whatever_the_limit(tmp_path):
    cache = KernelCache(tmp_path / "root", max_bytes=1)
    for key in (KEY, OTHER):
        cache.store(key, fake_cubin(), "", {})
    assert left(cache) == {KEY, OTHER}


def test_size_is_looked_at_only_when_it_may_have_changed(cache, monkeypatch):
    looks = []
    monkeypatch.setattr(KernelCache, "evict", lambda _, limit: looks.append(limit) or _store.PruneReport((), 0))
    limited = KernelCache(cache.root, max_bytes=64 * 5000)
    for number in range(10):
        limited.store(key_of(number), fake_cubin(bytes(900)), "", {})
    assert looks == [64 * 5000] * 3


def test_only_one_process_of_a_node_evicts(cache):
    keys = fill(cache, [9000])
    name = hashlib.sha256(str(cache.path).encode()).hexdigest()[:16]
    with try_lock(f"evict-{name}") as free:
        assert free
        assert cache.evict(1).removed == ()
    assert cache.evict(1).removed == tuple(keys)


def test_clear(cache):
    keys = fill(cache, [10, 10, 10])
    cache.quarantine(keys[0])
    (cache.entry_path(keys[1]) / "meta.json").unlink()
    report = cache.clear()
    assert set(report.removed) == {keys[1], keys[2]}
    assert report.bytes > 3000
    assert left(cache) == set()
    assert (len(cache.quarantined()), Statistics.of(cache).entries) == (0, 0)
    assert KernelCache(cache.root / "none").clear().removed == ()


def test_verify_finds_and_mends(cache, monkeypatch):
    kernels = [fake_kernel(f"kernel_{number}") for number in range(4)]
    keys = [kernel[0] for kernel in kernels]
    assert all(cache.store(*kernel) for kernel in kernels)
    assert cache.verify() == []
    (cache.entry_path(keys[0]) / "kernel.cubin").write_bytes(b"")
    (cache.entry_path(keys[1]) / "kernel.cu").write_text("another source")
    cache.path.chmod(0o755 | 0o020)
    found = cache.verify()
    assert {p.key for p in found} == {"", keys[0], keys[1]}
    assert not any(p.fixed for p in found)
    assert "digest of kernel.cu" in next(p.message for p in found if p.key == keys[1])
    mended = cache.verify(fix=True)
    assert all(p.fixed for p in mended)
    assert len(mended) == 3
    assert cache.verify() == []
    assert left(cache) == {keys[2], keys[3]}

    def unreadable(_, key, **__):
        if key == keys[2]:
            raise PermissionError(13, "Permission denied")
        raise FileNotFoundError

    monkeypatch.setattr(KernelCache, "read", unreadable)
    (problem,) = cache.verify(fix=True)
    assert (problem.key, problem.message, problem.fixed) == (keys[2], "cannot be read: Permission denied", False)


def test_permissions_that_cannot_be_mended_stay_a_problem(cache, monkeypatch):
    cache.store(*fake_kernel())
    cache.path.chmod(0o777)

    def fail(*_):
        raise PermissionError("no")

    monkeypatch.setattr(_cache.os, "chmod", fail)
    assert [p.fixed for p in cache.verify(fix=True)] == [False]


def test_stats(cache):
    empty = Statistics.of(cache)
    assert (empty.entries, empty.bytes, empty.limit_bytes, empty.oldest_use) == (0, 0, None, None)
    keys = fill(cache, [100, 5000])
    stats = Statistics.of(KernelCache(cache.root, max_bytes=7))
    assert (stats.entries, stats.limit_bytes, stats.path) == (2, 7, str(cache.root))
    assert stats.bytes == sum(i.disk_bytes for i in cache.entries())
    used = [time_of(info.used_at) for info in cache.entries()]
    assert (stats.oldest_use, stats.newest_use) == (min(used), max(used))
    assert stats.oldest_use != stats.newest_use
    cache.quarantine(keys[0])
    assert (len(cache.quarantined()), Statistics.of(cache).quarantined_bytes > 1000) == (1, True)


def test_read_only_cache_is_never_written(tmp_path, warnings):
    writable = KernelCache(tmp_path / "root")
    whole, damaged = fake_kernel("first"), fake_kernel("second")
    writable.store(*whole)
    writable.store(*damaged)
    stamp = time.time() - 7200
    os.utime(writable.entry_path(whole[0]) / "meta.json", (stamp, stamp))
    (writable.entry_path(damaged[0]) / "kernel.cubin").write_bytes(b"")
    before = {p: p.lstat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}
    cache = KernelCache(tmp_path / "root", read_only=True)
    assert cache.load(whole[0]) is not None
    assert cache.load(damaged[0]) is None
    assert cache.load(damaged[0]) is None
    assert len(warnings) == 1
    assert cache.quarantine(damaged[0]) is False
    assert cache.remove([whole[0]]).removed == cache.clear().removed == ()
    assert [p.fixed for p in cache.verify(fix=True)] == [False]
    assert {p: p.lstat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))} == before
    writable.path.chmod(0o775)
    assert cache.load(whole[0]) is not None
    writable.path.chmod(0o777)
    assert cache.load(whole[0]) is None


def test_listing_is_not_held_up_by_what_is_no_file(cache, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})
    cache.store(OTHER, fake_cubin(), "", {})
    (cache.entry_path(KEY) / "meta.json").unlink()
    os.mkfifo(cache.entry_path(KEY) / "meta.json")
    assert left(cache) == {OTHER}
    monkeypatch.setattr(_entry, "LIMIT", 10)
    assert left(cache) == set()


def test_a_cache_that_is_not_there_yet_has_no_problems(tmp_path):
    absent = KernelCache(tmp_path / "absent")
    assert absent.verify(fix=True) == []
    assert (Statistics.of(absent).entries, absent.clear().removed) == (0, ())
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    "words",
    [("rm", KEY, OTHER), ("prune", "--older-than", "1h", "--yes"), ("clear", "--yes")],
    ids=lambda words: words[0],
)
def test_a_command_that_could_not_remove_everything_fails(cache, words):
    """A script that makes room must not go on as if there were some."""
    for key in (KEY, OTHER):
        cache.store(key, fake_cubin(), "source", {"entry": "kernel"})
        os.utime(cache.entry_path(key) / "meta.json", (1, 1))
    folder = cache.entry_path(KEY).parent
    folder.chmod(0o500)
    done = ordinary("cache", *words, "--cache-dir", str(cache.root), "--json")
    folder.chmod(0o700)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["removed"] == [OTHER]
    assert "cannot remove from kernel cache" in done.stderr
    assert left(cache) == {KEY}


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + ".5", "9" * 300 + "T"])
def test_a_size_that_no_number_holds_is_refused_as_others_are(text):
    with pytest.raises(ValueError, match="a number of bytes that a disk could have"):
        parse_size(text)
    with pytest.raises(ConfigError, match="MEGAMOE_JIT_CACHE_MAX_BYTES='9"):
        Settings.load({"MEGAMOE_JIT_CACHE_MAX_BYTES": text})


def test_clear_fails_as_long_as_anything_is_left(cache):
    """What cannot be read, or was put aside, is something too."""
    cache.store(KEY, fake_cubin(), "source", {})
    (cache.entry_path(KEY) / "meta.json").write_text("{")
    cache.store(OTHER, fake_cubin(), "source", {})
    cache.quarantine(OTHER)
    aside = cache.path / "quarantine"
    for folder in (cache.entry_path(KEY).parent, aside):
        folder.chmod(0o500)
        done = ordinary("cache", "clear", "--yes", "--cache-dir", str(cache.root))
        folder.chmod(0o700)
        assert done.returncode == 1, done.stderr
        cache.store(OTHER, fake_cubin(), "source", {})
        cache.quarantine(OTHER)
    assert ordinary("cache", "clear", "--yes", "--cache-dir", str(cache.root)).returncode == 0


def test_a_root_that_others_may_write_is_found_and_mended(cache):
    cache.store(*fake_kernel())
    cache.root.chmod(0o777)
    (problem,) = cache.verify()
    assert (problem.path, "can be written by other users" in problem.message) == (cache.root, True)
    assert [p.fixed for p in cache.verify(fix=True)] == [True]
    assert cache.root.stat().st_mode & 0o777 == 0o755
    assert cache.verify() == []


def test_a_shared_folder_is_not_made_private(cache):
    cache.store(*fake_kernel())
    cache.root.chmod(0o1777)
    assert [p.fixed for p in cache.verify(fix=True)] == [False]
    assert cache.root.stat().st_mode & 0o7777 == 0o1777


def test_nothing_is_put_aside_in_the_cache_of_somebody_else(cache, monkeypatch):
    cache.store(KEY, fake_cubin(), "", {})
    owner = cache.root.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:  # what belongs to root is trusted
        for path in [cache.root, *cache.root.rglob("*")]:
            os.chown(path, 1234, 1234)
    problems = cache.verify(fix=True)
    assert problems
    assert [p.key for p in problems] == [""] * len(problems)
    assert cache.entry_path(KEY).exists()
