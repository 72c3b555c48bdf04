"""Conditions as documents of benchmarks have them."""

from __future__ import annotations

ENV = {
    "device": "NVIDIA H200",
    "date": "2026-01-02T00",
    "commit": "0123456789ab",
    "driver": "580",
    "nvrtc": "13.0",
    "cuda": "13.0",
    "torch": "2.11",
}
