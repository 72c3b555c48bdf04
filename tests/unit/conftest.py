"""Fixtures that several unit tests of the cache share."""

from __future__ import annotations

import logging

import pytest

from megamoe_jit._cache import KernelCache


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
