"""Which capture a stream takes part in, by a driver's answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from megamoe_jit._device import capture as _capture
from megamoe_jit._device.capture import capture_id

NONE, ACTIVE, INVALIDATED = 0, 1, 2
ASKED = []


def answering(refused: int, status: int, number: int) -> Callable[..., int]:
    def info(stream, at_status, at_number, *rest):
        ASKED.append(stream)
        assert rest == (None, None, None), "the driver refuses to tell edges that are not plain"
        for at, kind, value in ((at_status, ctypes.c_int, status), (at_number, ctypes.c_uint64, number)):
            ctypes.cast(at, ctypes.POINTER(kind))[0] = value
        return refused

    return info


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ((0, ACTIVE, 2**40), 2**40),
        ((0, NONE, 3), None),
        ((0, INVALIDATED, 3), None),
        ((906, ACTIVE, 3), None),  # CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
    ],
)
def test_a_capture_that_goes_on_has_a_number(monkeypatch: pytest.MonkeyPatch, answer, number: int | None):
    monkeypatch.setattr(_capture, "_capture_info", lambda: answering(*answer))
    assert capture_id(64) == number
    assert ASKED.pop() == 64


def test_the_legacy_stream_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_capture, "_capture_info", lambda: answering(0, ACTIVE, 3))
    assert capture_id(0) is None
    assert ASKED == []


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    _capture._capture_info.cache_clear()
    monkeypatch.setattr(_capture.ctypes, "CDLL", missing)
    assert capture_id(64) is None
    _capture._capture_info.cache_clear()
