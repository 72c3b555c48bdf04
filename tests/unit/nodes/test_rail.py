"""`TorchRail`: what it asks of a process group, and the memory that counts come to the host in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamoe_jit._nodes import rail as _rail
from megamoe_jit._nodes.rail import TorchRail
from megamoe_jit._nodes.watch import RailLost


class Group:
    """A process group of one node, which keeps the options of what it is asked."""

    def __init__(self) -> None:
        self.options: list[Any] = []

    def allgather_into_tensor_coalesced(self, outputs, inputs, options) -> None:
        self.options.append(options)
        for output, given in zip(outputs, inputs, strict=True):
            output.copy_(given)

    def alltoall_base(self, output, given, arriving, leaving, options) -> None:
        self.options.append(options)
        output.copy_(given)

    def _allgather_base(self, output, given, options) -> None:
        self.options.append(options)
        output.copy_(given)


def test_collectives_stay_in_the_order_of_the_callers_stream():
    """What is done when the call returns, or follows in the stream, leaves nothing to wait for."""
    group = Group()
    rail, given = TorchRail(group, 1, 0, 1.0), torch.arange(4)
    output = torch.empty_like(given)
    rail.gather([output], [given])
    rail.swap(output, given)
    assert rail.counts(given[:1])() == [[0]]
    assert [each.asyncOp for each in group.options] == [False] * 3


class Memory:
    """Memory of the host that a stand-in for a GPU copies numbers to."""

    def __init__(self) -> None:
        self.holds: list[list[int]] = []

    def copy_(self, tensor: Any, non_blocking: bool) -> None:
        assert non_blocking
        self.holds = tensor.numbers

    def tolist(self) -> list[list[int]]:
        return self.holds


class Event:
    """Over as soon as it is asked, or never."""

    over = True

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.over


def test_memory_of_counts_is_used_again_once_they_are_read(monkeypatch: pytest.MonkeyPatch):
    made: list[Memory] = []

    def landing(tensor: Any) -> tuple[Memory, Event]:
        made.append(Memory())
        return made[-1], Event()

    monkeypatch.setattr(_rail, "_landing", landing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    rail = TorchRail(None, 2, 0, 0.0, missing=lambda: {1: "is gone"})

    def coming(number: int) -> Any:
        return rail._to_host(SimpleNamespace(device=torch.device("cuda", 0), numbers=[[number]]))

    first, second = coming(1), coming(2)
    assert (first(), second(), len(made)) == ([[1]], [[2]], 2), "of two that are under way, each has its own"
    third, fourth = coming(3), coming(4)
    assert (fourth(), third(), len(made)) == ([[4]], [[3]], 2)
    monkeypatch.setattr(Event, "over", False)
    with pytest.raises(RailLost):
        coming(5)()
    monkeypatch.setattr(Event, "over", True)
    last = [coming(number) for number in (6, 7)]
    assert [wait() for wait in last] == [[[6]], [[7]]]
    assert len(made) == 3, "a copy may still come to what nobody has read"
