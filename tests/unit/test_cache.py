"""The cache on disk: keys are pure, entries are whole or absent, damage heals, failures only warn."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe_jit import _cache, _locks
from megamoe_jit._cache import KernelCache, cache_key
from megamoe_jit._locks import key_lock, lock_dir, private_directory
from megamoe_jit._settings import override
from megamoe_jit._toolchain import Toolchain

TOOLS = Toolchain(Path("/x/libnvrtc.so.12"), (12, 9), "abcd")
KEY = "ab" + "0" * 62
REPO = Path(__file__).resolve().parents[2]


def fake_cubin(body=b"body"):
    data = bytearray(64)
    data[:6] = b"\x7fELF\x02\x01"
    data[8] = 7
    struct.pack_into("<H", data, 18, 190)
    struct.pack_into("<I", data, 48, 0x5A0D5A)
    return bytes(data) + body


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path / "root")


@pytest.fixture
def warnings():
    """The warnings of the test, as a list that grows."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("megamoe_jit").addHandler(handler)
    yield records
    logging.getLogger("megamoe_jit").removeHandler(handler)


def key(source="s", options=("-a", "-b"), entry="e", arch="sm_90a", tools=TOOLS):
    return cache_key(source, options, entry, arch, tools)


def test_key_depends_on_every_input_but_the_path():
    keys = [
        key(),
        key(source="s "),
        key(options=("-b", "-a")),
        key(options=("-a", "-b", "-c")),
        key(options=("-a-b",)),
        key(entry="f"),
        key(arch="sm_90"),
        key(tools=Toolchain(TOOLS.path, (12, 8), "abcd")),
        key(tools=Toolchain(TOOLS.path, (12, 9), "abce")),
    ]
    assert len(set(keys)) == len(keys)
    assert key(tools=Toolchain(Path("/elsewhere"), (12, 9), "abcd")) == keys[0]
    assert all(len(k) == 64 and int(k, 16) >= 0 for k in keys)


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_fields_cannot_run_into_each_other(a, b, c, d):
    assert (key(source=a, entry=b) == key(source=c, entry=d)) == ((a, b) == (c, d))


def test_key_is_the_same_in_other_processes(tmp_path):
    code = (
        "from pathlib import Path; from megamoe_jit._cache import cache_key; "
        "from megamoe_jit._toolchain import Toolchain; "
        "print(cache_key('s', ('-a', '-b'), 'e', 'sm_90a', Toolchain(Path('y'), (12, 9), 'abcd')))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPO)}
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=True,
        )
        assert run.stdout.strip() == key()


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


def test_losing_the_race_is_silent(cache, warnings):
    assert cache.store(KEY, fake_cubin(b"first"), "", {})
    assert cache.store(KEY, fake_cubin(b"second"), "", {})
    assert cache.load(KEY).cubin.endswith(b"first")
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


def rewrite(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_other_key(folder):
    rewrite(folder, key="f" * 64)


def damage_other_arch(folder):
    rewrite(folder, arch="sm_100a")


def damage_no_elf(folder):
    import hashlib

    (folder / "kernel.cubin").write_bytes(b"not an ELF")
    rewrite(folder, cubin_bytes=10, cubin_sha256=hashlib.sha256(b"not an ELF").hexdigest())


@pytest.mark.parametrize("damage", [f for name, f in sorted(globals().items()) if name.startswith("damage_")])
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


def test_unknown_schema_is_a_miss_not_damage(cache, warnings):
    cache.store(KEY, fake_cubin(), "", {})
    rewrite(cache.entry_path(KEY), schema=99)
    assert cache.load(KEY) is None
    assert cache.entry_path(KEY).is_dir()
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


def test_full_or_read_only_disk_leaves_nothing(cache, warnings, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(_cache.os, "rename", fail)
    assert cache.store(KEY, fake_cubin(), "", {}) is False
    assert len(warnings) == 1
    assert list((cache.path / ".tmp").iterdir()) == []
    assert cache.load(KEY) is None


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


def test_symbolic_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="not a directory"):
        private_directory(tmp_path / "link")


def test_entries_and_remove(cache):
    other = "cd" + "1" * 62
    cache.store(KEY, fake_cubin(), "", {"entry": "one"})
    cache.store(other, fake_cubin(), "", {"entry": "two"})
    (cache.path / "cd" / ("2" * 64)).mkdir()
    listed = cache.entries()
    assert {e["entry"] for e in listed} == {"one", "two"}
    assert all(e["disk_bytes"] > e["cubin_bytes"] and Path(e["path"]).is_dir() for e in listed)
    assert cache.remove(KEY) is True
    assert cache.remove(KEY) is False
    assert [e["key"] for e in cache.entries()] == [other]
    assert KernelCache(cache.root / "none").entries() == []


def test_use_is_noted_at_most_hourly(cache):
    cache.store(KEY, fake_cubin(), "", {})
    meta = cache.entry_path(KEY) / "meta.json"
    for age, touched in ((60, False), (7200, True)):
        stamp = time.time() - age
        os.utime(meta, (stamp, stamp))
        cache.load(KEY)
        assert (meta.stat().st_mtime > stamp + 1) is touched


def test_left_over_staging_is_swept(cache):
    cache.store(KEY, fake_cubin(), "", {})
    for name, age in (("old", 7200), ("young", 60)):
        folder = cache.path / ".tmp" / name
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    cache.store("cd" + "1" * 62, fake_cubin(), "", {})
    assert [p.name for p in (cache.path / ".tmp").iterdir()] == ["young"]


def test_lock_excludes_times_out_and_is_released(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(_locks, "PATIENCE_S", 0.05)
    with override(lock_dir=tmp_path / "locks", lock_timeout_s=0.1):
        with key_lock(KEY, "kernel") as outer:
            assert outer is True
            with key_lock(KEY, "kernel") as inner:
                assert inner is False
            with key_lock("cd" * 32, "another") as free:
                assert free is True
        with key_lock(KEY, "kernel") as again:
            assert again is True
    text = "\n".join(w.getMessage() for w in warnings)
    assert f"waiting for process {os.getpid()}, which is compiling kernel" in text
    assert "compiling it here as well" in text


def test_lock_failures_do_not_stand_in_the_way(tmp_path, warnings, monkeypatch):
    (tmp_path / "file").write_text("")
    with override(lock_dir=tmp_path / "file" / "locks"), key_lock(KEY, "kernel") as held:
        assert held is False
    import fcntl

    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with override(lock_dir=tmp_path / "locks"), key_lock(KEY, "kernel") as held:
        assert held is False
    assert len(warnings) == 2


def test_an_error_inside_the_lock_passes_through(tmp_path):
    with override(lock_dir=tmp_path):
        with pytest.raises(KeyError), key_lock(KEY, "kernel"):
            raise KeyError
        with key_lock(KEY, "kernel") as held:
            assert held is True


def test_default_lock_directory_is_private_and_falls_through(tmp_path, monkeypatch):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / f"megamoe-jit-{os.geteuid()}").mkdir(mode=0o700)
    (bad / f"megamoe-jit-{os.geteuid()}").chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(bad))
    folder = lock_dir()
    assert not str(folder).startswith(str(bad))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
