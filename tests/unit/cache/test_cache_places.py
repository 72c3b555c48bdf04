"""Every kind of file in every place of a cache, and where packs are read: nothing hangs, nothing outside is touched."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import stat
import tempfile
import time
import warnings as warned_by_python

import pytest

from megamoe_jit._cache import locks as _locks
from megamoe_jit._cache import trees as _trees
from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.documents import Statistics
from megamoe_jit._cache.locks import key_lock, try_lock
from megamoe_jit._documents import time_of
from megamoe_jit._errors import PackError
from megamoe_jit._jit.pack import export_pack, import_pack, read_pack
from megamoe_jit._settings.settings import override
from tests.stubs import fake_kernel

FIRST, SECOND = fake_kernel("first"), fake_kernel("second")
KEY = FIRST[0]


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """What waits for a pipe waits for ever; what waits for a disk waits long enough."""

    def late(*_):
        raise AssertionError("it hangs")

    monkeypatch.setattr(os, "fsync", lambda _: None)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def precious(tmp_path):
    """A file that belongs to nobody here, and that links lead to; it is there in the end."""
    folder = tmp_path / "somebody"
    folder.mkdir()
    file = folder / "precious"
    file.write_text("keep")
    yield file
    assert file.read_text() == "keep"
    assert [name for name in os.listdir(folder) if not name.endswith(".lock")] == ["precious"]


def make_socket(path, _):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name[:90])


def make_directory(path, _):
    path.mkdir(mode=0o700)
    (path / "x").write_text("x")


#: each makes one kind of file, given its path and a file that a link may lead to
KINDS = {
    "pipe": lambda path, _: os.mkfifo(path),
    "socket": make_socket,
    "device": lambda path, _: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5)),  # as /dev/zero
    "empty directory": lambda path, _: path.mkdir(mode=0o700),
    "directory": make_directory,
    "closed directory": lambda path, _: (make_directory(path, _), path.chmod(0)),
    "dangling link": lambda path, _: path.symlink_to("nowhere"),
    "loop": lambda path, _: path.symlink_to(path.name),
    "link to a directory": lambda path, precious: path.symlink_to(precious.parent),
    "link to a file": lambda path, precious: path.symlink_to(precious),
    "file": lambda path, _: path.write_text("x"),
    "closed file": lambda path, _: (path.write_text("x"), path.chmod(0)),
}
if os.geteuid() != 0:
    del KINDS["device"]

PLACES = {
    "version": "v1",
    "staging": "v1/.tmp",
    "quarantine": "v1/quarantine",
    "group": f"v1/{KEY[:2]}",
    "entry": f"v1/{KEY[:2]}/{KEY}",
    "binary": f"v1/{KEY[:2]}/{KEY}/kernel.cubin",
    "metadata": f"v1/{KEY[:2]}/{KEY}/meta.json",
    "source": f"v1/{KEY[:2]}/{KEY}/kernel.cu",
    "mark": f"v1/{KEY[:2]}/{KEY}/imported",
    "one more file": f"v1/{KEY[:2]}/{KEY}/more",
    "left over": "v1/.tmp/left-over",
    "put aside": "v1/quarantine/put-aside",
    "stray": "v1/stray",
}


def put(path, kind, precious):
    """This kind of file in place of what is there, as old as can be."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    assert _trees.delete(path)
    KINDS[kind](path, precious)
    os.utime(path, (1, 1), follow_symlinks=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_lies_in_a_cache_is_put_right(tmp_path, place, kind, precious):
    cache, path = KernelCache(tmp_path / "root", max_bytes=1), tmp_path / "root" / PLACES[place]
    with override(lock_dir=tmp_path / "locks"):
        cache.store(*FIRST)
        put(path, kind, precious)
        cache.load(KEY)
        cache.entries(), Statistics.of(cache), cache.verify(), cache.holds(KEY), cache.usable(KEY, "first")
        for kernel in (FIRST, SECOND):
            cache.store(*kernel)
        cache.remove([KEY])
        cache.prune(older_than_s=0)
        put(path, kind, precious)
        cache.verify(fix=True)
        usable = place != "version" or kind in ("empty directory", "directory", "closed directory")
        assert cache.store(*FIRST) is usable
        assert (cache.load(KEY) is not None) is usable
        if usable:
            assert cache.verify() == []
        cache.clear()
        assert cache.keys() == []
        assert len(cache.quarantined()) == 0
        assert not os.path.lexists(cache.path / ".tmp" / "left-over")


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "file"])
@pytest.mark.parametrize("place", ["staging", "quarantine", "group"])
def test_verify_finds_and_unlinks_what_is_in_the_place_of_a_directory(cache, place, kind, precious):
    cache.store(*FIRST)
    path = cache.root / PLACES[place]
    put(path, kind, precious)
    (problem,) = cache.verify()
    assert (problem.key, problem.path, problem.message) == ("", path, f"{path} is not a directory")
    assert [problem.fixed for problem in cache.verify(fix=True)] == [True]
    assert cache.verify() == []
    assert not os.path.lexists(path)


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_that_cannot_be_read_hides_no_other(tmp_path, warnings, kind, precious):
    KernelCache(tmp_path).store(*FIRST)
    given = KernelCache(tmp_path, read_only=True)
    put(given.path / ("00" if KEY[:2] != "00" else "01"), kind, precious)
    with warned_by_python.catch_warnings(record=True) as seen:
        warned_by_python.simplefilter("always", ResourceWarning)
        assert [info.key for info in given.entries()] == given.keys() == [KEY]
    assert (seen, warnings) == ([], []), "what was opened is closed"


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "link to a directory", "file"])
@pytest.mark.parametrize("place", ["staging", "quarantine", "group"])
def test_what_is_in_the_place_of_a_directory_gives_way(cache, warnings, place, kind, precious):
    """Without `verify --fix`: a kernel is kept, put aside and removed."""
    cache.store(*FIRST)
    path = cache.root / PLACES[place]
    put(path, kind, precious)
    assert (cache.load(KEY) is None) is (place == "group")
    assert cache.store(*FIRST)
    assert cache.load(KEY) is not None
    assert cache.quarantine(KEY)
    assert cache.store(*FIRST)
    put(path, kind, precious)
    assert cache.remove([KEY]).removed == (() if place == "group" else (KEY,))
    told = {warning.getMessage() for warning in warnings}
    assert told == {f"{path} was not a directory, and is removed"} or place == "quarantine"


def test_what_a_link_in_a_cache_leads_to_is_not_removed(cache, tmp_path):
    cache.store(*FIRST)
    group = cache.root / PLACES["group"]
    group.rename(tmp_path / "elsewhere")
    group.symlink_to(tmp_path / "elsewhere")
    assert cache.keys() == []
    assert cache.clear().removed == cache.prune(older_than_s=0).removed == ()
    assert [problem.path for problem in cache.verify(fix=True)] == [group]
    assert (tmp_path / "elsewhere" / KEY / "kernel.cubin").read_bytes() == FIRST[1]
    assert KernelCache(cache.root).store(*FIRST)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_verify_finds_and_mends_a_group_that_others_may_write(cache, mode):
    """Nothing would be kept there."""
    cache.store(*FIRST)
    group = cache.root / PLACES["group"]
    group.chmod(mode)
    assert [problem.path for problem in cache.verify()] == [group]
    assert [problem.fixed for problem in cache.verify(fix=True)] == [True]
    assert cache.verify() == []
    assert cache.load(KEY) is not None


@pytest.mark.parametrize("mode", [0, 0o300])
@pytest.mark.parametrize("place", ["version", "staging", "quarantine", "group"])
def test_verify_finds_and_opens_a_directory_that_is_closed_to_its_owner(cache, place, mode):
    cache.store(*FIRST)
    path = cache.root / PLACES[place]
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(mode)
    (problem,) = cache.verify()
    says = f"{path} is closed to its owner (mode {mode:03o})"
    assert (problem.key, problem.path, problem.message, problem.fixed) == ("", path, says, False)
    assert [problem.fixed for problem in cache.verify(fix=True)] == [True]
    assert cache.verify() == []
    assert cache.load(KEY) is not None


def test_verify_opens_what_lies_below_what_it_opens(cache):
    cache.store(*FIRST)
    below = cache.root / PLACES["group"]
    for path in (below, cache.path):
        path.chmod(0)
    assert [problem.path for problem in cache.verify(fix=True)] == [cache.path, below]
    assert cache.verify() == []


@pytest.mark.parametrize("place", ["staging", "quarantine", "group"])
def test_a_directory_that_is_closed_to_its_owner_is_opened(cache, warnings, place):
    """Without `verify --fix`: a kernel is kept, put aside and removed."""
    cache.store(*FIRST)
    path = cache.root / PLACES[place]
    path.mkdir(mode=0o700, exist_ok=True)
    for use in (lambda: cache.store(*FIRST), lambda: cache.quarantine(KEY), cache.clear):
        path.chmod(0)
        assert use()
        path.chmod(0o700)  # not each use needs each directory
        assert cache.store(*FIRST)
    cache.quarantine(KEY)
    path.chmod(0)
    cache.clear()
    assert len(cache.quarantined()) == 0
    told = {warning.getMessage() for warning in warnings}
    assert f"{path} was closed to its owner, and is opened" in told
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("use", ["load", "store", "verify", "remove", "clear"])
def test_a_kernel_whose_directory_is_closed_to_its_owner_stands_in_nobodys_way(cache, use):
    """Nobody but root sees what is in it, so it is put aside as damaged."""
    cache.store(*FIRST)
    cache.entry_path(KEY).chmod(0)
    if use in ("load", "store"):
        assert (cache.load(KEY) is not None) is (os.geteuid() == 0)
    elif use == "verify":
        assert all(problem.fixed for problem in cache.verify(fix=True))
    else:
        assert (cache.clear() if use == "clear" else cache.remove([KEY])).removed == (KEY,)
    assert cache.store(*FIRST)
    assert cache.load(KEY) is not None
    assert cache.verify() == []


@pytest.mark.parametrize("mode", [0o500, 0o555])
def test_a_cache_that_its_owner_made_unwritable_stays_so(cache, mode):
    cache.store(*FIRST)
    (cache.path / "quarantine").mkdir(mode=0o700)
    folders = [cache.path / ".tmp", cache.path / "quarantine", cache.root / PLACES["group"], cache.path, cache.root]
    for folder in folders:
        folder.chmod(mode)
    assert cache.store(*SECOND) is (os.geteuid() == 0)
    assert cache.verify(fix=True) == []
    cache.clear()
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {mode}
    assert (cache.load(KEY) is None) is (os.geteuid() == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_lies_in_a_read_only_cache_is_left_there(tmp_path, place, kind, precious):
    KernelCache(tmp_path / "root").store(*FIRST)
    put(tmp_path / "root" / PLACES[place], kind, precious)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    cache = KernelCache(tmp_path / "root", read_only=True)
    cache.load(KEY)
    cache.of_source(FIRST[3]["source_id"])
    cache.entries(), Statistics.of(cache), cache.usable(KEY, "first"), cache.verify(fix=True), cache.clear()
    cache.prune(older_than_s=0)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_read_from_and_written_to_a_plain_file_alone(tmp_path, kind, precious):
    with override(cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks"):
        user_cache().store(*FIRST)
        path = tmp_path / "pack.tar"
        put(path, kind, precious)
        for attempt in (lambda: read_pack(path), lambda: import_pack(path)):
            with pytest.raises(PackError) as refused:
                attempt()
            unlike = kind in ("pipe", "device", "socket") or "directory" in kind
            assert str(refused.value).endswith("is not a plain file") is unlike
        if kind in ("file", "closed file", "link to a file"):
            assert export_pack(path).keys == (KEY,)
            assert read_pack(path).keys == (KEY,)
        else:
            with pytest.raises(PackError, match="cannot write"):
                export_pack(path)
        assert user_cache().keys() == [KEY]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["locks", f"locks/{KEY}.lock"])
def test_a_lock_stands_in_nobodys_way(tmp_path, place, kind, precious):
    put(tmp_path / place, kind, precious)
    with override(lock_dir=tmp_path / "locks", lock_timeout_s=0.1):
        for _ in range(2):
            with key_lock(KEY, "a kernel"), try_lock(KEY):
                pass


def refuse_directories(monkeypatch):
    """An overlay file system does not rename directories of its lower layers: they answer as if on another disk."""
    real = os.rename

    def rename(source, target):
        if os.path.isdir(source) and f".tmp{os.sep}" not in str(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)


@pytest.fixture(params=["simulated", "real"])
def layered(request, tmp_path, monkeypatch):
    """A cache whose entries lie in the lower layer of an overlay file system."""
    lower = KernelCache(tmp_path / "lower")
    lower.store(*FIRST)
    lower.store(*SECOND)
    if request.param == "simulated":
        refuse_directories(monkeypatch)
        yield lower
        return
    import subprocess

    base, merged = tmp_path / "upper", tmp_path / "merged"
    base.mkdir(), merged.mkdir()
    tmpfs = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], capture_output=True, check=False)
    (base / "upper").mkdir(), (base / "work").mkdir()
    layers = f"lowerdir={lower.root},upperdir={base}/upper,workdir={base}/work,redirect_dir=off"
    if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], capture_output=True).returncode:
        if tmpfs.returncode == 0:
            subprocess.run(["umount", base], check=True)
        pytest.skip("file systems cannot be mounted here")
    yield KernelCache(merged)
    subprocess.run(["umount", merged], check=True)
    subprocess.run(["umount", base], check=True)


def test_a_damaged_kernel_of_a_lower_layer_is_put_aside_and_made_anew(layered, warnings):
    file = layered.entry_path(KEY) / "kernel.cubin"
    file.write_bytes(b"damaged")
    assert layered.load(KEY) is None
    assert len(warnings) == 1
    assert len(layered.quarantined()) == 1
    assert [each.read_bytes() for each in layered.path.glob("quarantine/*/kernel.cubin")] == [b"damaged"]
    assert layered.store(*FIRST)
    assert layered.load(KEY).cubin == FIRST[1]
    file.write_bytes(b"damaged")
    assert [problem.fixed for problem in layered.verify(fix=True)] == [True]
    assert layered.verify() == []


def test_a_cache_of_a_lower_layer_can_be_emptied(layered, warnings):
    assert layered.remove([KEY]).removed == (KEY,)
    assert layered.clear().removed == (SECOND[0],)
    assert layered.keys() == []
    assert list((layered.path / ".tmp").iterdir()) == []
    assert layered.store(*FIRST)
    assert layered.load(KEY) is not None
    assert not warnings


def test_a_copy_that_fails_leaves_the_entry_where_it_is(layered, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with warned_by_python.catch_warnings(record=True) as seen:
        warned_by_python.simplefilter("always", ResourceWarning)
        assert layered.quarantine(KEY) is False
    assert seen == [], "what was opened is closed"
    assert layered.load(KEY) is not None
    assert list((layered.path / "quarantine").iterdir()) == []


@pytest.mark.parametrize("year", [2100, 9999, 60000])
def test_times_in_the_future_make_nothing_immortal(tmp_path, year):
    with override(lock_dir=tmp_path / "locks"):
        cache = KernelCache(tmp_path / "root")
        cache.store(*FIRST)
        meta = cache.entry_path(KEY) / "meta.json"
        stamp = (year - 1970) * 31556952
        os.utime(meta, (stamp, stamp))
        (info,) = cache.entries()
        assert info.used_at == pytest.approx(time.time(), abs=60)  # when the time was set
        assert Statistics.of(cache).newest_use == time_of(info.used_at)
        assert cache.load(KEY) is not None
        assert meta.stat().st_mtime == pytest.approx(time.time(), abs=60), "a use is noted"
        os.utime(meta, (stamp, stamp))
        assert cache.prune(older_than_s=0).removed == ()
        with contextlib.ExitStack() as later:
            now = time.time() + 7200
            patch = later.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(time, "time", lambda: now)
            assert cache.prune(older_than_s=3600).removed == (KEY,)


@pytest.mark.parametrize("place", ["binary", "entry", "group"])
def test_a_kernel_that_cannot_be_put_in_its_place_is_not_stored(cache, warnings, monkeypatch, precious, place):
    """The place is taken by what is damaged and stays: on a read-only mount, or immutable."""
    cache.store(*FIRST)
    put(cache.root / PLACES[place], "file", precious)
    real = os.unlink

    def stays(path, *more, **named):
        if str(path) == str(cache.root / PLACES["group"]):
            raise OSError(errno.EPERM, "Operation not permitted")
        real(path, *more, **named)

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", stays)
    monkeypatch.setattr("megamoe_jit._cache.store.move", refuse)
    assert cache.load(KEY) is None
    assert cache.store(*FIRST) is False
    assert "nothing is kept there" in warnings[-1].getMessage()
    assert not cache.usable(KEY, "first")


def test_lock_files_find_a_place_without_a_temporary_directory(tmp_path, monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert _locks.lock_dir().parent == _locks.Path("/dev/shm")
    monkeypatch.setattr(_locks.Path, "is_dir", lambda _: False)
    with pytest.raises(FileNotFoundError, match="No usable temporary directory"):
        _locks.lock_dir()


def test_names_that_are_no_text(tmp_path):
    """A directory and a pack whose names hold a byte that is not UTF-8."""
    odd = tmp_path / os.fsdecode(b"odd-\xff")
    with override(cache_dir=odd, lock_dir=tmp_path / "locks", cache_max_bytes=1):
        assert user_cache().store(*FIRST)
        pack = export_pack(tmp_path / os.fsdecode(b"pack-\xfe.tar")).path
        user_cache().clear()
        assert import_pack(pack).imported == (KEY,)
        assert (user_cache().entry_path(KEY) / "imported").read_bytes() == b"pack-\xfe.tar\n"
        assert user_cache().load(KEY) is not None
