"""Until kernels are prepared, whatever a rank refuses or lacks ends on all ranks: real processes, no GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.spawn import World, describe, run_ranks
from megamoe_jit._layer import admit as _admit
from megamoe_jit._layer import bound_kernel as _bound_kernel
from megamoe_jit._layer import kernel_set as _kernel_set
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import MoEShape

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
SHAPE, ZEROS = MoEShape(256, 128, 4, 2), torch.zeros


def outcome(action) -> str:
    try:
        action()
    except mm.MegaMoeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def without_a_gpu() -> None:
    """Stand-ins for CUDA in this process, for good; loading a kernel says that it was reached."""

    def load(*_: object, **__: object) -> None:
        raise mm.CompileError("loading was reached")

    _memory.check_device = lambda _: None
    _memory.allocate_symmetric = lambda _, size, *__: (
        torch.empty(size, dtype=torch.uint8),
        SimpleNamespace(buffer_ptrs=[0, 0]),
    )
    _kernel_set.sm_count = lambda _: 132
    _bound_kernel.load_kernel, _bound_kernel.encode_fp8_rows = load, lambda *_: None
    torch.cuda.mem_get_info = lambda *_: (1 << 40, 1 << 40)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda *_: 0
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_name = lambda *_: "none"
    torch.cuda.device = lambda _: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    pin_nothing()


def pin_nothing(refuse: bool = False) -> None:
    """Page-locked memory is plain memory, or there is none."""

    def zeros(*sizes: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory and refuse:
            raise torch.OutOfMemoryError("no room for page-locked memory\nmore")
        return ZEROS(*sizes, **options)

    torch.zeros = zeros


def buffer() -> SymmBuffer:
    return SymmBuffer(SHAPE, 128, torch.device("cpu"), dist.group.WORLD)


def arguments(it: SymmBuffer) -> dict[str, object]:
    local = SHAPE.experts // it.ranks
    l1, l2 = (mm.quantize_weights(torch.zeros(local, 256, columns)) for columns in (256, 128))
    mm.mark_transformed(l1, l2)
    return {"y": torch.zeros(3, 256, dtype=torch.bfloat16), "l1_weights": l1, "l2_weights": l2, "sym_buffer": it}


def first_calls(world: World) -> list[str]:
    """What each rank hears when the last one makes a mistake, then when none does."""
    it, last = buffer(), world.rank == world.ranks - 1
    right = arguments(it)
    mistakes = (
        {"y": torch.zeros(3, 128, dtype=torch.bfloat16)},
        {"num_sms": 999},
        {"variant": "pong"},
        {"l2_weights": (right["l2_weights"][0], right["l2_weights"][1].double())},
        {"activation_clamp": -1.0},
        {},
    )
    heard = []
    for mistake in mistakes:
        given = {**right, **(mistake if last else {})}
        heard.append(outcome(lambda given=given: mm.fp8_mega_moe(**given)))
    it.destroy()
    return heard


def prepared_calls(world: World) -> dict[str, str]:
    """What the last rank hears when it calls alone: in a capture, with what is prepared, with what is not."""

    def meet(*_: object) -> None:
        raise mm.RankMismatchError("a collective")

    it, collective = buffer(), _admit.collectively
    call, heard = arguments(it), {}
    _bound_kernel.load_kernel = lambda spec, *_, **__: SimpleNamespace(key=spec.kernel_name)
    _bound_kernel.Launcher = lambda *_, **__: SimpleNamespace(launch=lambda *_: None)
    _bound_kernel.sides_of_sms = lambda _: None
    it.launch = lambda plan, *_: heard.update(launched=plan.kernel.spec.kernel_name)
    _admit.collectively = _kernel_set.collectively = meet
    torch.cuda.is_current_stream_capturing = lambda: True
    heard["capture"] = outcome(lambda: mm.fp8_mega_moe(**call))
    torch.cuda.is_current_stream_capturing = lambda: False
    _admit.collectively = _kernel_set.collectively = collective
    it.prepare("pingpong")  # and the other, on both ranks
    _admit.collectively = _kernel_set.collectively = meet
    if world.rank == world.ranks - 1:
        heard["prepared"] = outcome(lambda: mm.fp8_mega_moe(**call, variant="cooperative"))
        heard["exact"] = outcome(lambda: mm.fp8_mega_moe(**call, fast_math=False))
    it.destroy()
    return heard


def allocations(world: World) -> list[str]:
    """What each rank hears when the memory of the last one is full."""
    pin_nothing(refuse=world.rank == world.ranks - 1)
    heard = [outcome(buffer)]
    rows = 4095 if world.rank else 4096
    return [*heard, outcome(lambda: SymmBuffer(SHAPE, 128, torch.device("cpu"), dist.group.WORLD, rows))]


def on_rank(world: World) -> dict[str, object]:
    """All of them in one process: most of the time goes into its start."""
    without_a_gpu()
    return {each.__name__: each(world) for each in (first_calls, prepared_calls, allocations)}


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Any]]:
    """What each of two ranks heard."""
    ends = run_ranks("tests.unit.layer.test_calls_first:on_rank", 2, device="cpu", timeout_s=60)
    assert all(end.ok for end in ends), describe(ends)
    return [end.result for end in ends]


def test_an_argument_that_one_rank_refuses_is_refused_on_all(heard: list[dict[str, Any]]):
    others, owns = (rank["first_calls"] for rank in heard)
    said = ["y has shape (3, 128)", "num_sms = 999", "unknown kernel variant 'pong'", "l2 scales has dtype", "= -1.0"]
    for other, own, part in zip(others, owns, said, strict=False):
        assert own.startswith("ConfigError: ")
        assert part in own
        assert other == f"MegaMoeError: checking the arguments of the first call failed on rank 1: {own}"
    assert [others[-1], owns[-1]] == ["CompileError: loading was reached"] * 2
    assert len(owns) == len(said) + 1


def test_once_prepared_or_in_a_capture_ranks_do_not_meet(heard: list[dict[str, Any]]):
    first, last = (rank["prepared_calls"] for rank in heard)
    assert first["capture"] == last["capture"]
    assert first["capture"].startswith("CaptureError: kernels of several ranks are prepared collectively")
    assert (last["prepared"], last["launched"]) == ("nothing", "megamoe_cooperative_h256_i128_e4_k2_r2_fast")
    assert last["exact"] == "RankMismatchError: a collective", "other kernels than those that are prepared"


def test_memory_that_one_rank_lacks_is_an_error_on_all(heard: list[dict[str, Any]]):
    others, owns = (rank["allocations"] for rank in heard)
    assert owns[0].startswith("ConfigError: a buffer for 128 tokens of MoEShape(")
    assert owns[0].endswith(" bytes: no room for page-locked memory; allowed: fewer tokens per rank")
    assert others[0] == f"MegaMoeError: allocating the buffer failed on rank 1: {owns[0]}"
    assert owns[1] == "ConfigError: max_pool_rows = 4095 is not supported; allowed: 4096 or more"
    assert others[1] == f"MegaMoeError: checking the layer failed on rank 1: {owns[1]}"
