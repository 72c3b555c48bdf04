"""What outlasts an engine's sleep is made by another thread: pools of engines are of the one that loads a model."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._errors import CaptureError, ConfigError
from megamoe_jit._spec import FP8, MXFP4, MoEShape
from megamoe_jit.engines import across
from megamoe_jit.engines.apart import made_apart
from megamoe_jit.engines.local import LocalExperts

SHAPE = MoEShape(256, 128, 4, 2)
entered: list[int] = []  #: threads that made a context current


@pytest.fixture
def devices(monkeypatch):
    """A machine with GPUs as far as is asked here, this thread's being the third; the devices that threads chose."""
    chosen = {threading.get_ident(): 2}
    entered.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[threading.get_ident()])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.update({threading.get_ident(): device}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: entered.append(threading.get_ident()))
    return chosen


class Buffer:
    """Knows the device of the thread that made it, and of those that prepared it."""

    shape, rank, ranks = SHAPE, 0, 1

    def __init__(self, *_, **__) -> None:
        self.made = _here()
        self.fault = torch.zeros(16, dtype=torch.int32)
        self.prepared: list[tuple[str, int]] = []

    def prepare_all(self, weight_format: str) -> None:
        self.prepared.append((weight_format, _here()))


def _here() -> int:
    assert threading.current_thread() is not threading.main_thread()
    return torch.cuda.current_device()


def test_another_thread_has_the_device_of_this_one_and_its_context(devices):
    """Calls of the driver, which bind kernels, need one that is current."""
    assert made_apart(_here) == 2
    assert made_apart(lambda: entered[-1] == threading.get_ident())


def test_without_a_gpu_there_are_no_pools(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert made_apart(threading.current_thread) is threading.main_thread()


def test_what_it_raises_is_raised_here(devices):
    def refuse() -> None:
        raise ConfigError("no memory")

    with pytest.raises(ConfigError, match="no memory"):
        made_apart(refuse)


def test_a_capture_of_this_thread_is_seen(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError, match="before the capture"):
        made_apart(_here)


def test_buffers_of_a_rank(devices, monkeypatch):
    monkeypatch.setattr("megamoe_jit.engines.local.lease", lambda *_: SimpleNamespace(buffer=Buffer()))
    found = LocalExperts(SHAPE, torch.device("cuda", 2), weights=MXFP4)._lease.buffer
    assert (found.made, found.prepared) == (2, [("mxfp4", 2)])


def test_buffers_of_a_group_are_made_once_and_prepared_for_each_format(devices, monkeypatch):
    monkeypatch.setattr(across, "_buffers", {})
    monkeypatch.setattr("megamoe_jit._layer.calls.get_symm_buffer_for_mega_moe", Buffer)
    found = [across.buffer_across(None, 4, 128, 2, 256, 128, weights=each) for each in ((FP8,), (FP8, MXFP4), (MXFP4,))]
    assert found[1:] == found[:1] * 2
    assert (found[0].made, found[0].prepared) == (2, [("fp8", 2), ("mxfp4", 2)])


def test_a_buffer_whose_kernels_failed_is_not_made_again(devices, monkeypatch):
    """It would be lost with the symmetric memory that it has."""
    made = []

    def make(*_, **__) -> Buffer:
        made.append(Buffer())
        return made[-1]

    def refuse(_: object, weight_format: str) -> None:
        raise ConfigError(f"no compiler for {weight_format}")

    monkeypatch.setattr(across, "_buffers", {})
    monkeypatch.setattr("megamoe_jit._layer.calls.get_symm_buffer_for_mega_moe", make)
    with monkeypatch.context() as broken:
        broken.setattr(Buffer, "prepare_all", refuse)
        with pytest.raises(ConfigError, match="no compiler for fp8"):
            across.buffer_across(None, 4, 128, 2, 256, 128)
    assert across.buffer_across(None, 4, 128, 2, 256, 128) is made[0]
    assert made[0].prepared == [("fp8", 2)]
