"""Until kernels are prepared, whatever a rank refuses or lacks ends on all ranks: real processes, no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.spawn import World, describe, run_ranks
from megamoe_jit._layer import buffer as _buffer
from megamoe_jit._layer import calls as _api
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._numerics import Numerics
from megamoe_jit._spec import MoEShape, Variant

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
SHAPE = MoEShape(256, 128, 4, 2)


def outcome(action) -> str:
    try:
        action()
    except mm.MegaMoeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def buffer(world: World) -> SymmBuffer:
    """What a call looks at before it prepares; `prepare` says that it was reached."""
    made = SymmBuffer.__new__(SymmBuffer)
    made.shape, made.device, made.group = SHAPE, torch.device("cpu"), dist.group.WORLD
    made.rank, made.ranks, made.num_experts, made.num_topk, made.hidden = world.rank, world.ranks, 4, 2, 256
    made.num_max_tokens_per_rank, made._prepared, made._plans, made._planned_with = 128, {}, {}, None

    def prepare(*_: object) -> None:
        raise mm.CompileError("prepare was reached")

    made.prepare = prepare
    return made


def first_calls(world: World) -> list[str]:
    """What each rank hears when the last one makes a mistake, then when none does."""
    _buffer.sm_count = lambda _: 132
    torch.cuda.get_device_name = lambda *_: "none"
    torch.cuda.is_current_stream_capturing = lambda: False
    it, last = buffer(world), world.rank == world.ranks - 1
    local = SHAPE.experts // world.ranks
    l1 = mm.quantize_weights(torch.zeros(local, 256, 256))
    l2 = mm.quantize_weights(torch.zeros(local, 256, 128))
    right = {"y": torch.zeros(3, 256, dtype=torch.bfloat16), "l1": l1, "l2": l2}
    heard = []
    for mistake in (
        {"y": torch.zeros(3, 128, dtype=torch.bfloat16)},
        {"num_sms": 999},
        {"variant": "pong"},
        {"l2": (l2[0], l2[1].double())},
        {"activation_clamp": -1.0},
        {},
    ):
        given = {**right, **(mistake if last else {})}
        heard.append(outcome(lambda given=given: mm.fp8_mega_moe(sym_buffer=it, **given)))
    return heard


def test_an_argument_that_one_rank_refuses_is_refused_on_all():
    ends = run_ranks("tests.unit.layer.test_calls_first:first_calls", 2, device="cpu", timeout_s=60)
    assert all(end.ok for end in ends), describe(ends)
    said = ["y has shape (3, 128)", "num_sms = 999", "unknown kernel variant 'pong'", "l2 scales has dtype", "= -1.0"]
    for other, own, part in zip(ends[0].result, ends[1].result, said, strict=False):
        assert own.startswith("ConfigError: ")
        assert part in own
        assert other == f"MegaMoeError: checking the arguments of the first call failed on rank 1: {own}"
    assert [end.result[-1] for end in ends] == ["CompileError: prepare was reached"] * 2


def test_once_prepared_or_in_a_capture_ranks_do_not_meet(monkeypatch: pytest.MonkeyPatch):
    def meet(*_: object) -> None:
        raise AssertionError("a collective")

    monkeypatch.setattr(_api, "collectively", meet)
    monkeypatch.setattr(_buffer, "sm_count", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    it = buffer(SimpleNamespace(rank=0, ranks=2))
    l1, l2 = mm.quantize_weights(torch.zeros(2, 256, 256)), mm.quantize_weights(torch.zeros(2, 256, 128))
    call = {"y": torch.zeros(3, 256, dtype=torch.bfloat16), "l1": l1, "l2": l2, "sym_buffer": it}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert outcome(lambda: mm.fp8_mega_moe(**call)) == "CompileError: prepare was reached"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    it._prepared = {(variant, Numerics()): None for variant in Variant}
    assert outcome(lambda: mm.fp8_mega_moe(**call)) == "CompileError: prepare was reached"
    with pytest.raises(AssertionError, match="a collective"):
        mm.fp8_mega_moe(**call, fast_math=False)


def allocations(world: World) -> list[str]:
    """What each rank hears when the memory of the last one is full."""
    _memory.check_device = lambda _: None
    torch.cuda.mem_get_info = lambda *_: (1 << 40, 1 << 40)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda *_: 0
    torch.cuda.synchronize = lambda *_: None
    _memory.allocate_symmetric = lambda _, size, *__: (torch.empty(size, dtype=torch.uint8), SimpleNamespace())
    zeros = torch.zeros

    def pinned(*sizes: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory and world.rank == world.ranks - 1:
            raise torch.OutOfMemoryError("no room for page-locked memory\nmore")
        return zeros(*sizes, **options)

    torch.zeros = pinned
    heard = [outcome(lambda: SymmBuffer(SHAPE, 128, torch.device("cpu"), dist.group.WORLD))]
    rows = 4095 if world.rank else 4096
    return [*heard, outcome(lambda: SymmBuffer(SHAPE, 128, torch.device("cpu"), dist.group.WORLD, rows))]


def test_memory_that_one_rank_lacks_is_an_error_on_all():
    ends = run_ranks("tests.unit.layer.test_calls_first:allocations", 2, device="cpu", timeout_s=60)
    assert all(end.ok for end in ends), describe(ends)
    other, own = (end.result[0] for end in ends)
    assert own.startswith("ConfigError: a buffer for 128 tokens of MoEShape(")
    assert own.endswith(" bytes: no room for page-locked memory; allowed: fewer tokens per rank")
    assert other == f"MegaMoeError: allocating the buffer failed on rank 1: {own}"
    other, own = (end.result[1] for end in ends)
    assert own == "ConfigError: max_pool_rows = 4095 is not supported; allowed: 4096 or more"
    assert other == f"MegaMoeError: checking the layer failed on rank 1: {own}"
