"""Kernels that the cache has but cannot be used, and those that it cannot keep: what is said is what a run finds."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe_jit._cache import store as _store
from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.locks import key_lock
from megamoe_jit._cli import cli
from megamoe_jit._compile import nvrtc as _compiler
from megamoe_jit._diagnose.explain import explain, kernel_state
from megamoe_jit._errors import KernelMissingError
from megamoe_jit._jit import lookup as _lookup
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.runtime import forget
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant

PING = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
SIZES = [
    "--hidden",
    "256",
    "--intermediate",
    "128",
    "--experts",
    "8",
    "--topk",
    "2",
    "--variant",
    "pingpong",
    "--inputs",
    "staged",
]


@pytest.fixture
def damaged(place):
    """The place of a kernel whose binary lost its end."""
    kernel = get_kernel(PING)
    forget()
    folder = user_cache().entry_path(kernel.key)
    (folder / "kernel.cubin").write_bytes(kernel.cubin[:-1])
    return folder


def invoke(*words):
    done = CliRunner().invoke(cli, [*words, *SIZES, "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def test_a_damaged_kernel_is_not_cached(damaged, warnings):
    """Nor does the question put it aside, or note a use."""
    with override(disable_jit=True):
        assert kernel_state(PING).cached is False
        code, plan = invoke("warmup", "--dry-run")
        assert (code, plan["cached"], plan["missing"]) == (0, 0, 1)
        assert explain(PING.shape, 8, variant="pingpong").cached is False
        assert damaged.is_dir()
        assert [str(damaged) in warning.getMessage() for warning in warnings] == [True]
        with pytest.raises(KernelMissingError):
            get_kernel(PING)


def test_a_damaged_kernel_of_a_read_only_cache_is_not_cached(damaged, warnings):
    pack = user_cache().root
    with override(cache_dir=pack.parent / "own", readonly_cache=(pack,), disable_jit=True):
        assert kernel_state(PING).cached is False
        with pytest.raises(KernelMissingError):
            get_kernel(PING)


def test_a_warmup_that_keeps_nothing_says_so(damaged, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(_store, "move", refuse)
    code, doc = invoke("warmup")
    assert (code, doc["compiled"], [kernel["stored"] for kernel in doc["kernels"]]) == (1, 1, [False])


@pytest.mark.parametrize("cache", ["none", "a file in its place", "below a file"])
def test_what_is_not_kept_is_not_waited_for(place, cache):
    """Every process compiles it anyway: together, and not one after the other."""
    (place / "file").write_text("")
    where = {"none": {"no_cache": True}, "a file in its place": {"cache_dir": place / "file"}}
    found = []
    with (
        override(**where.get(cache, {"cache_dir": place / "file" / "cache"}), lock_timeout_s=1000),
        key_lock(Wanted.of(PING).key, "as another process does"),
    ):
        thread = threading.Thread(target=lambda: found.append(get_kernel(PING).origin), daemon=True)
        thread.start()
        thread.join(60)
        assert found == ["compiled"]


def test_a_cache_that_keeps_is_waited_for(place):
    with override(lock_timeout_s=1000):
        found = []
        thread = threading.Thread(target=lambda: found.append(get_kernel(PING).origin), daemon=True)
        with key_lock(Wanted.of(PING).key, "as another process does"):
            thread.start()
            thread.join(0.3)
            assert found == []
        thread.join(60)
        assert found == ["compiled"]


def test_a_full_dump_directory_keeps_nothing_by_halves(place, monkeypatch, caplog):
    real, dump = Path.write_bytes, place / "dump"

    def full(path, data):
        if path.parent != dump:
            return real(path, data)
        real(path, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_compiler.Path, "write_bytes", full)
    with override(dump_dir=dump):
        assert get_kernel(PING).origin == "compiled"
    assert os.listdir(dump) == []
    assert "cannot dump to" in caplog.text


def test_a_kernel_is_kept_under_a_path_that_is_no_text(place):
    """And by a compiler that lies under one."""
    with override(cache_dir=place / os.fsdecode(b"odd-\xff"), cache_max_bytes=1):
        assert get_kernel(PING).origin == "compiled"
        forget()
        assert get_kernel(PING).origin == "disk"
        code, doc = invoke("warmup")
        assert (code, doc["cached"], doc["failed"]) == (0, 1, 0)


def test_what_metadata_say_of_this_machine_can_always_be_read(place, monkeypatch):
    """A host name or a path of the compiler need not be text, or printable."""
    toolchain = _lookup.find_toolchain()
    odd = type(toolchain)(Path(os.fsdecode(b"/lib/\xff\n") + toolchain.path.name), toolchain.version, toolchain.build)
    compiled = _obtain.compile_source
    monkeypatch.setattr(_lookup, "find_toolchain", lambda: odd)
    monkeypatch.setattr(
        _obtain, "compile_source", lambda text, **named: compiled(text, **{**named, "toolchain": toolchain})
    )
    monkeypatch.setattr(_store, "_host", lambda: os.fsdecode(b"host-\xff"))
    key = get_kernel(PING).key
    assert key == Wanted.of(PING).key
    (info,) = KernelCache(place / "cache").entries()
    assert info.meta["nvrtc"]["path"].startswith("/lib/\\udcff\\n")
    assert info.meta["host"] == "host-\\udcff"
    assert user_cache().verify() == []
