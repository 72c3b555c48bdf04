"""Fixtures that several unit tests of the cache and the runtime share."""

from __future__ import annotations

import logging
import tempfile

import pytest

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.registry import reset
from megamoe_jit._settings.settings import override
from tests.stubs import write_rooms


@pytest.fixture
def cache(tmp_path):
    """An empty cache of the test's own."""
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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A small kernel directory, a cold cache and a lock directory, in force as settings."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = write_rooms(tmp_path / "src")
    reset()
    with override(kernels_src=source, cache_dir=tmp_path / "cache", lock_dir=tmp_path / "locks", strict="error"):
        yield tmp_path
    reset()


@pytest.fixture
def compiles(monkeypatch):
    """The entries compiled so far, counted around the real compiler."""
    real, seen = _obtain.compile_source, []

    def count(text, *, kernel_name, toolchain):
        seen.append(kernel_name)
        return real(text, kernel_name=kernel_name, toolchain=toolchain)

    monkeypatch.setattr(_obtain, "compile_source", count)
    return seen
