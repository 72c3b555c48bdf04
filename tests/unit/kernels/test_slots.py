"""Which expert and weight a slot has, by the kernels' own code built here: as the reference expands the router's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megamoe_jit.reference import with_shared_experts
from tests import host

#: Of a rank the router's experts and the shared ones; ranks; slots of the router.
SIZES = ("4 0 2 3", "1 1 1 1", "3 5 4 2", "32 1 8 6", "5 24 2 8")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target, plain = tmp_path_factory.mktemp("slots") / "slots", host.SOURCES / "plain"
    return host.build(host.SOURCES / "slots.cpp", target, "-iquote", str(plain), "-Wno-unused")


def by_the_kernel(program: Path, sizes: str, rank: int, where: str, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    given = ids.contiguous().view(torch.uint8).numpy().tobytes()
    out = subprocess.run([program, sizes, str(rank), where], input=given, capture_output=True, check=True).stdout
    slots = torch.frombuffer(bytearray(out), dtype=torch.uint8).view(len(ids), -1, 12)
    return slots[..., :8].contiguous().view(torch.int64)[..., 0], slots[..., 8:].contiguous().view(torch.float32)[
        ..., 0
    ]


def odd_ids(experts: int, bits: int) -> list[int]:
    """Ids around what is one, and around what wraps when it is cut, divided or multiplied."""
    near = range(-3, 4)
    ends = (0, experts, 2 * experts, 1 << 31, -(1 << 31), 1 << 32, -(1 << 32), 1 << 62, (1 << 63) - 4, 3 - (1 << 63))
    thirds = [sign * (1 << 32) // n for n in (3, 5, 7, 24) for sign in (1, -1)]
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1
    return [odd for end in (*ends, *thirds) for by in near if least <= (odd := end + by) <= most]


@pytest.mark.parametrize("where", ["buffer", "64", "32"])
@pytest.mark.parametrize("sizes", SIZES)
def test_slots_are_those_of_the_reference(program: Path, sizes: str, where: str):
    local, shared, ranks, topk = map(int, sizes.split())
    experts = local * ranks
    every = [*range(experts), *odd_ids(experts, 32 if where == "32" else 64)]
    every += [-1] * (-len(every) % topk)
    ids = torch.tensor(every, dtype=torch.int64).view(-1, topk)
    weights = torch.arange(len(every), dtype=torch.float32).view(-1, topk)
    for rank in range(ranks):
        want, want_weights = with_shared_experts(
            ids, weights, experts, shared, shared_weight=-0.5, rank=rank, ranks=ranks
        )
        found, found_weights = by_the_kernel(program, sizes, rank, where, ids)
        real = (found >= 0) & (found < (local + shared) * ranks)  # as the kernel asks; the others are masked
        assert torch.equal(torch.where(real, found, -1), want)
        assert torch.equal(found_weights, want_weights)
