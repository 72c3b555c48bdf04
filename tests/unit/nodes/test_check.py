"""`check()`: the rail is asked while the device works, and says which node is lost before a kernel would."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._errors import PeerTimeoutError
from tests.unit.layer.test_calls import L1, L2, Cuda, refused
from tests.unit.nodes.test_one_node import Echo, buffer_of


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> Iterator[mm.MultiNodeBuffer]:
    """After a call whose device does not come to its end while the test lasts."""
    Cuda(monkeypatch).kernel = lambda params: None
    over = threading.Event()
    it = buffer_of(2, timeout_s=0.01)
    mm.fp8_mega_moe_multinode(torch.empty(3, 256, dtype=torch.bfloat16), L1, L2, it)
    it.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: over.wait(30))
    yield it
    over.set()


def test_a_rank_that_is_lost_is_named_and_nothing_waits_after_that(buffer: mm.MultiNodeBuffer):
    with pytest.raises(PeerTimeoutError, match=r"in call 1 .*, nothing came for 0.01 s \(missing: node 1 \(rank 1\)"):
        buffer.check()
    refused(buffer.check, "node 1 (rank 1): its process is gone", kind=PeerTimeoutError)
    buffer.destroy()


def test_what_nccl_has_noticed_is_told(buffer: mm.MultiNodeBuffer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Echo, "error", lambda self, device: "remote_error")
    with pytest.raises(PeerTimeoutError, match="NCCL reports remote_error .*node 1"):
        buffer.check()
