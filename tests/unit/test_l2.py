"""Telling the halves of the L2 apart: from latencies as an H200 has them, and from what must not be taken for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megamoe_jit import _l2
from megamoe_jit._l2 import LINES, MOST_SMS, split
from megamoe_jit._params import SIDE_WORDS

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
    found = split(latencies(shuffled, seed=seed), 128)
    assert found is not None
    assert len(found) == SIDE_WORDS
    mine = bits(found)[:128]
    assert torch.equal(mine, shuffled) or torch.equal(mine, ~shuffled)
    assert not bits(found)[128:].any()


def test_both_sides_get_as_many_sms():
    """68 and 64: two count as of the other side, and no more than two."""
    side = torch.arange(SMS) >= 68
    found = split(latencies(side), SMS)
    assert found is not None
    mine = bits(found)[:SMS]
    assert int(mine.sum()) == SMS // 2
    assert min(int((mine ^ side).sum()), int((mine ^ ~side).sum())) == 2


def test_sm_ids_may_have_gaps():
    whole = latencies(gpcs(144))
    whole[40:52] = 0
    found = split(whole, SMS)
    assert found is not None
    assert not bits(found)[40:52].any()
    assert split(whole, SMS + 1) is None, "an SM that was not reached could be on either side"


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
    assert split(latencies(side, **more), SMS) is None, what


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(_l2, "_known", {})
    properties = SimpleNamespace(multi_processor_count=SMS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_a_device_is_measured_once(fresh: torch.device, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(_l2, "_latencies", lambda device, sms: asked.append((device, sms)) or latencies(gpcs()))
    first = _l2.sides_of_sms(fresh)
    assert first is not None
    assert first is _l2.sides_of_sms(fresh)
    assert asked == [(fresh, SMS)]


def test_a_failure_is_no_error_and_tried_again(
    fresh: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(device: torch.device, sms: int) -> torch.Tensor:
        raise RuntimeError("cuModuleLoadData: CUDA_ERROR_JIT_COMPILER_NOT_FOUND")

    with caplog.at_level("INFO", "megamoe_jit"):
        monkeypatch.setattr(_l2, "_latencies", fails)
        assert _l2.sides_of_sms(fresh) is None
        monkeypatch.setattr(_l2, "_latencies", lambda device, sms: latencies(gpcs(), gap=0))
        assert _l2.sides_of_sms(fresh) is None
    assert "CUDA_ERROR_JIT_COMPILER_NOT_FOUND" in caplog.text
    assert "no two halves" in caplog.text
    monkeypatch.setattr(_l2, "_latencies", lambda device, sms: latencies(gpcs()))
    assert _l2.sides_of_sms(fresh) is not None


def test_the_measuring_kernel_has_what_the_host_gives_it():
    """The driver compiles it on a GPU (tests/gpu/test_l2.py); here, its numbers."""
    assert f"rem.u32 %line, %line, {LINES};" in _l2.PROBE
    assert f"setp.ge.u32 %never, %sm, {MOST_SMS};" in _l2.PROBE
    assert _l2.STRIDE % 128 == 0
    assert (_l2.STRIDE // 128) % 2 == 1
    assert "{" in _l2.PROBE
    assert "{LINES}" not in _l2.PROBE
