"""Telling the halves of the L2 apart: from latencies as an H200 has them, and from what must not be taken for them."""

from __future__ import annotations

import ctypes
import enum
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megamoe_jit._device import l2_partition as _l2
from megamoe_jit._device.l2_partition import LINES, MOST_SMS, split
from megamoe_jit._errors import LoadError
from megamoe_jit._spec.abi import SIDE_WORDS

SMS = 132


def latencies(side: torch.Tensor, noise: float = 8, gap: float = 180, seed: int = 0) -> torch.Tensor:
    """What SMs of these sides (bool) would measure: far lines take longer, and each SM has its own distance to all."""
    draw = torch.Generator().manual_seed(seed)
    home = torch.rand(LINES, generator=draw) < 0.5
    cycles = 350 + gap * (side[:, None] ^ home[None, :])
    cycles = (
        cycles + 60 * torch.rand(len(side), 1, generator=draw) + noise * torch.randn(len(side), LINES, generator=draw)
    )
    out = torch.zeros(MOST_SMS, LINES, dtype=torch.int32)
    out[: len(side)] = cycles.int()
    return out


def bits(words: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([words[i // 32] >> i % 32 & 1 for i in range(32 * SIDE_WORDS)], dtype=torch.bool)


def gpcs(count: int = SMS) -> torch.Tensor:
    """Sides as on a real chip: eight SMs of one, eight of the other."""
    return torch.arange(count) // 8 % 2 == 1


@pytest.mark.parametrize("seed", range(5))
def test_two_halves_are_told_apart(seed: int):
    shuffled = gpcs(128)[torch.randperm(128, generator=torch.Generator().manual_seed(seed))]
    found = split(latencies(shuffled, seed=seed))
    assert found is not None
    assert len(found) == SIDE_WORDS
    mine = bits(found)[:128]
    assert torch.equal(mine, shuffled) or torch.equal(mine, ~shuffled)
    assert not bits(found)[128:].any()


def test_both_sides_get_as_many_sms():
    """68 and 64: two count as of the other side, and no more than two."""
    side = torch.arange(SMS) >= 68
    found = split(latencies(side))
    assert found is not None
    mine = bits(found)[:SMS]
    assert int(mine.sum()) == SMS // 2
    assert min(int((mine ^ side).sum()), int((mine ^ ~side).sum())) == 2


def test_sm_ids_may_have_gaps():
    whole = latencies(gpcs(144))
    whole[40:52] = 0
    found = split(whole)
    assert found is not None
    assert not bits(found)[40:52].any()


@pytest.mark.parametrize(
    ("what", "side", "more"),
    [
        ("one half", torch.zeros(SMS, dtype=torch.bool), {}),
        ("only noise", gpcs(), {"gap": 0}),
        ("a few SMs apart", torch.arange(SMS) < 20, {}),
        ("too much noise", gpcs(), {"noise": 400}),
    ],
)
def test_anything_else_has_no_sides(what: str, side: torch.Tensor, more: dict[str, float]):
    assert split(latencies(side, **more)) is None, what


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(_l2, "_known", {})
    monkeypatch.setattr(_l2, "_failed", {})
    monkeypatch.setattr(_l2, "sm_count", lambda device: SMS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.device("cuda", 0)


def test_a_device_is_measured_once(fresh: torch.device, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(_l2, "_latencies", lambda device, sms: asked.append(device) or latencies(gpcs()))
    first = _l2.sides_of_sms(fresh)
    assert first is not None
    assert first is _l2.sides_of_sms(fresh)
    assert asked == [fresh]


def test_what_failed_is_tried_again(
    fresh: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(device: torch.device, sms: int) -> torch.Tensor:
        raise RuntimeError("cuModuleLoadData: CUDA_ERROR_JIT_COMPILER_NOT_FOUND")

    missed = latencies(gpcs())
    missed[17] = 0
    with caplog.at_level("INFO", "megamoe_jit"):
        monkeypatch.setattr(_l2, "_latencies", fails)
        assert _l2.sides_of_sms(fresh) is None
        monkeypatch.setattr(_l2, "_latencies", lambda device, sms: missed)
        assert _l2.sides_of_sms(fresh) is None
    assert "CUDA_ERROR_JIT_COMPILER_NOT_FOUND" in caplog.text
    assert "131 of 132 SMs were reached" in caplog.text
    monkeypatch.setattr(_l2, "_latencies", lambda device, sms: latencies(gpcs()))
    assert _l2.sides_of_sms(fresh) is not None


def test_what_fails_always_is_given_up(fresh: torch.device, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fails(device: torch.device, sms: int) -> torch.Tensor:
        asked.append(device)
        raise RuntimeError("cuModuleLoadData: CUDA_ERROR_JIT_COMPILER_NOT_FOUND")

    monkeypatch.setattr(_l2, "_latencies", fails)
    assert [_l2.sides_of_sms(fresh) for _ in range(9)] == [None] * 9
    assert len(asked) == _l2.MOST_TRIES


def test_a_chip_without_halves_is_measured_once(
    fresh: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked = []
    monkeypatch.setattr(_l2, "_latencies", lambda device, sms: asked.append(device) or latencies(gpcs(), gap=0))
    with caplog.at_level("INFO", "megamoe_jit"):
        assert [_l2.sides_of_sms(fresh) for _ in range(3)] == [None] * 3
    assert len(asked) == 1
    assert caplog.text.count("no two halves") == 1


def test_nothing_is_measured_while_a_graph_is_captured(fresh: torch.device, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(_l2, "_latencies", lambda device, sms: asked.append(device) or latencies(gpcs()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (_l2.sides_of_sms(fresh), asked) == (None, [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = _l2.sides_of_sms(fresh)
    assert found is not None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _l2.sides_of_sms(fresh) is found, "what is known costs nothing"


class Refused(enum.IntEnum):
    CUDA_ERROR_BROKEN = 222


class Driver:
    """Stands in for `cuda.bindings.driver`; the call `broken` fails, the launch writes what an H200 would."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.calls = broken, []
        self.CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __getattr__(self, name: str) -> object:
        def call(*given: object) -> tuple:
            self.calls.append((name, *given))
            if name == self.broken:
                return (Refused.CUDA_ERROR_BROKEN,)
            if name == "cuLaunchKernel":
                (_, target), _ = given[9]
                measured = latencies(gpcs()).contiguous()
                ctypes.memmove(target, measured.data_ptr(), measured.numel() * 4)
            return (0, b"it is broken" if name == "cuGetErrorString" else name)

        return call


@pytest.fixture
def here(fresh: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, as a device that has SMs and a stream."""
    monkeypatch.setattr(_l2, "_modules", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return torch.device("cpu")


def use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


def test_what_the_driver_is_asked_for(here: torch.device, monkeypatch: pytest.MonkeyPatch):
    driver = Driver()
    use(driver, monkeypatch)
    assert torch.equal(_l2._latencies(here, SMS), latencies(gpcs()))
    assert [call[0] for call in driver.calls] == [
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchKernel",
    ]
    (_, text), (_, module, entry), (_, _, _, shared), (_, _, *launch) = driver.calls
    assert text.endswith(b"}\n\0")
    assert f".entry {entry.decode()}(".encode() in text
    assert (module, shared, launch[:8]) == ("cuModuleLoadData", _l2.SHARED_BYTES, [SMS, 1, 1, 1, 1, 1, shared, 7])
    assert _l2._modules == ["cuModuleLoadData"], "kept: unloading is not allowed while a graph is captured"


@pytest.mark.parametrize("broken", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"])
def test_a_driver_that_refuses_means_no_sides(here: torch.device, monkeypatch: pytest.MonkeyPatch, broken: str):
    driver = Driver(broken)
    use(driver, monkeypatch)
    with pytest.raises(LoadError, match=f"^{broken} failed: CUDA_ERROR_BROKEN"):
        _l2._latencies(here, SMS)
    assert [call[0] for call in driver.calls[-2:]] == [broken, "cuGetErrorString"]
    assert _l2.sides_of_sms(here) is None


def test_lines_are_spread_over_both_halves():
    """An odd number of lines of 128 bytes from one to the next."""
    assert _l2.STRIDE % 128 == 0
    assert (_l2.STRIDE // 128) % 2 == 1
