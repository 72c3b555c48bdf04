"""Conditions as documents of benchmarks have them, and what stands in for a GPU where one measures."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from benchmarks import frame
from megamoe_jit._bench import measure as _bench
from tests.unit.bench.test_measure import CONDITIONS, SMALL, Clock, Layer

ENV = {
    "device": "NVIDIA H200",
    "date": "2026-01-02T00",
    "commit": "0123456789ab",
    "driver": "580",
    "nvrtc": "13.0",
    "cuda": "13.0",
    "torch": "2.11",
}


def measured_here(monkeypatch: pytest.MonkeyPatch, module: ModuleType, package: Layer) -> None:
    """A benchmark of `frame` measures `package`, for SMALL alone, by a clock that stands in."""
    for owner, name, stand_in in (
        (_bench, "megamoe_jit", package),
        (frame, "preset", {"small": SMALL}.__getitem__),
        (module, "FLUSH_BYTES", 16),
        (frame, "require_hopper", lambda: torch.device("cpu")),
        (frame, "environment", lambda commit: {**CONDITIONS, "commit": commit}),
        (torch.cuda, "Event", Clock),
        *((torch.cuda, each, lambda *_: None) for each in ("synchronize", "_sleep", "empty_cache")),
    ):
        monkeypatch.setattr(owner, name, stand_in, raising=False)
