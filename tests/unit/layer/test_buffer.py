"""`SymmBuffer.destroy` without a GPU: what it does after a launch that failed, and when all is well."""

from __future__ import annotations

import logging
import shutil
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._compile import render as _render
from megamoe_jit._device import wait as _device_wait
from megamoe_jit._device.layout import MIN_POOL_ROWS
from megamoe_jit._errors import CaptureError, ConfigError, DeviceFaultError, PeerTimeoutError
from megamoe_jit._layer import buffer as _buffer
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.kernel_set import KernelSet
from megamoe_jit._layer.steady import SteadyCalls
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MoEShape
from megamoe_jit._spec.abi import Wait

GROUP = object()
NOTHING, PEER = (0, 0, 0, 0), (Wait.PEER_SIGNAL | 2 << 8, 0, 5, 0b10)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The groups that a collective was called on."""
    calls: list[object] = []
    monkeypatch.setattr(_buffer, "gather", lambda group, _: calls.append(group))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def buffer(ranks: int, fault: tuple[int, ...] = NOTHING) -> SymmBuffer:
    """A buffer on rank 0 whose last launch left this fault record."""
    made = SymmBuffer.__new__(SymmBuffer)
    made.device, made.group, made.rank, made.ranks = torch.device("cpu"), GROUP, 0, ranks
    made.buffer = made.local = torch.ones(8, dtype=torch.uint8)
    made.handle = SimpleNamespace(buffer_ptrs=[1])
    made.fault = torch.tensor([*fault, *[0] * 12], dtype=torch.int32)
    made.kernels = KernelSet(None, None, lambda: None)
    made.kernels.bound, made.kernels._plans = {"kernel": 1}, {"plan": 1}
    made._destroyed, made._broken = False, None
    made.steady = SteadyCalls(128, made.device)
    made.lock = threading.RLock()
    return made


def assert_empty(it: SymmBuffer) -> None:
    assert it.buffer.numel() == it.local.numel() == it.x.numel() == it.topk_weights.numel() == 0
    assert (it.handle.buffer_ptrs, it.kernels.bound, it.kernels._plans) == ([], {}, {})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_that_nobody_asked_for_is_warned_about(gathered: list[object], ranks: int):
    it = buffer(ranks, PEER)
    with pytest.warns(RuntimeWarning, match="while a SymmBuffer was destroyed: rank 0: .*missing: rank 1") as caught:
        it.destroy()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_empty(it)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it.destroy()
        del it
    assert gathered == [], "the other ranks may never come"


def test_an_error_of_the_driver_is_warned_about_too(gathered: list[object], monkeypatch: pytest.MonkeyPatch):
    def broken(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    it = buffer(2)
    with pytest.warns(RuntimeWarning, match="The driver said: CUDA error: an illegal memory access$"):
        it.destroy()
    assert isinstance(it._broken, DeviceFaultError)
    it.destroy()
    assert gathered == []


def test_a_context_that_is_broken_before_the_check(gathered: list[object], monkeypatch: pytest.MonkeyPatch):
    """Then torch refuses even to say whether a stream is capturing."""

    def refuse() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuse)
    with pytest.raises(PeerTimeoutError, match="missing: rank 1"):
        buffer(2, PEER).check()
    with pytest.raises(
        DeviceFaultError, match="The driver said: CUDA error: an illegal memory access was encountered$"
    ):
        buffer(1).check()


def test_a_failure_that_is_known_is_not_told_again(gathered: list[object]):
    it = buffer(2, PEER)
    with pytest.raises(PeerTimeoutError):
        it.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it.destroy()
        it.destroy()
    assert_empty(it)
    assert gathered == []


def test_all_ranks_meet_once_where_all_is_well(gathered: list[object]):
    it = buffer(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with it:
            pass
        it.destroy()
        del it
    assert gathered == [GROUP]


def test_a_kernel_that_the_driver_has_lost_is_reported_all_the_same(
    gathered: list[object], monkeypatch: pytest.MonkeyPatch
):
    for_ever = threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: for_ever.wait(60))
    monkeypatch.setattr(_device_wait, "GRACE_S", 0.2)
    it = buffer(1, (4 | 2 << 8, 7, 0, 1))
    try:
        with pytest.raises(DeviceFaultError, match="free pipeline stage 7.*SIGKILL"):
            it.check()
        with pytest.raises(DeviceFaultError, match="unusable since an earlier call failed"):
            it.require_usable()
        it.destroy()
        assert_empty(it)
    finally:
        for_ever.set()


@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_a_capture_is_no_fault(gathered: list[object], monkeypatch: pytest.MonkeyPatch, where: str):
    def refuse(_: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with monkeypatch.context() as capture:
        if where == "here":
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        else:
            capture.setattr(torch.cuda, "synchronize", refuse)
        it = buffer(2)
        for action in (it.check, it.destroy):
            with pytest.raises(CaptureError, match="capturing, and CUDA waits for no device meanwhile"):
                action()
    it.check()
    it.require_usable()
    assert it.buffer.numel() == 8
    it.destroy()
    assert_empty(it)
    assert gathered == [GROUP]


def test_what_ends_a_rank_is_told_before_it_waits_for_the_others(
    gathered: list[object], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.ERROR), pytest.raises(ConfigError), buffer(2):
        raise ConfigError("y has 9 rows")
    assert (
        "rank 0 leaves its SymmBuffer, and waits for the other ranks, because of ConfigError: y has 9 rows"
        in caplog.text
    )
    caplog.clear()
    with pytest.raises(ConfigError), buffer(1):
        raise ConfigError("y has 9 rows")
    assert caplog.text == ""


def test_what_ranks_have_in_common_is_found_without_rendering_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A buffer of several ranks is made in a millisecond of the host's, and still tells ranks with other sources."""

    def refuse(*_: object) -> None:
        raise AssertionError("rendered")

    monkeypatch.setattr(_memory, "check_device", lambda device: None)
    monkeypatch.setattr(_render, "_filled", refuse)
    it = buffer(2)
    it.shape = MoEShape(256, 128, 8, 2)
    said = it._admit(128, MIN_POOL_ROWS)
    assert said == it._admit(256, MIN_POOL_ROWS)
    copy = Path(shutil.copytree(_render.kernels_dir(), tmp_path / "kernels_src"))
    with override(kernels_src=copy):
        assert it._admit(128, MIN_POOL_ROWS) == said
        room = copy / "variants/pingpong.cuh"
        room.write_text(room.read_text() + "\n// another one\n")
        other = it._admit(128, MIN_POOL_ROWS)
    assert {field for field in said if said[field] != other[field]} == {"kernel sources"}
    it.ranks = 1
    assert it._admit(128, MIN_POOL_ROWS) == {}
