"""Reading a cache while entries are removed from it: all of an entry or nothing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from megamoe_jit._cache import entry as _entry
from megamoe_jit._cache.cache import KernelCache
from tests.stubs import KEY, OTHER, fake_cubin


def test_entry_removed_while_the_cache_is_verified_is_no_problem(cache, monkeypatch):
    for key in (KEY, OTHER):
        cache.store(key, fake_cubin(), "source", {})
    real = KernelCache.read

    def another_process_removes_it(this, key, **named):
        KernelCache(cache.root).remove([key])
        return real(this, key, **named)

    monkeypatch.setattr(KernelCache, "read", another_process_removes_it)
    assert cache.verify(fix=True) == []
    assert not (cache.path / "quarantine").exists()


def test_loading_beside_removal_gives_all_or_nothing(cache, warnings):
    """Entries come and go as fast as they can; a reader never sees anything but the whole or nothing."""
    cubin = fake_cubin(os.urandom(100_000))
    stop, counts, failures = threading.Event(), {True: 0, False: 0}, []

    def write():
        writer = KernelCache(cache.root)
        while not stop.is_set():
            writer.store(KEY, cubin, "source", {})
            writer.remove([KEY])

    def read():
        reader = KernelCache(cache.root)
        while not stop.is_set():
            entry = reader.load(KEY)
            counts[entry is not None] += 1
            if entry is not None and entry.cubin != cubin:
                failures.append(entry)

    threads = [threading.Thread(target=work) for work in (write, read, read)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while min(counts.values()) < 100 and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert not warnings
    assert min(counts.values()) > 0
    assert not (cache.path / "quarantine").exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_entry_that_vanishes_between_its_files_is_a_miss(cache, warnings, monkeypatch, replaced):
    cache.store(KEY, fake_cubin(), "", {})
    real = _entry._read

    def vanish(handle, name, forbidden):
        if name == "kernel.cubin":
            cache.remove([KEY])
            if replaced:
                cache.store(KEY, fake_cubin(), "", {})
        return real(handle, name, forbidden)

    with monkeypatch.context() as patch:
        patch.setattr(_entry, "_read", vanish)
        assert cache.load(KEY) is None
    assert not warnings
    assert (cache.load(KEY) is not None) is replaced
    assert Path(cache.path / "quarantine").exists() is False
