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
from megamoe_jit._check.weights import make_weights
from megamoe_jit._layer import admit as _admit
from megamoe_jit._layer import bound_kernel as _bound_kernel
from megamoe_jit._layer import kernel_set as _kernel_set
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MXFP4, MoEShape
from megamoe_jit._spec.formats import ExpandedParts
from tests.ranks import forked

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
SHAPE, ZEROS, EMPTY = MoEShape(256, 128, 4, 2), torch.zeros, torch.empty
EXPANDED = sum(ExpandedParts.of(256, 128, 2))  #: bytes, of the two experts of a rank


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
        heard["no weights"] = outcome(lambda: mm.fp8_mega_moe(**{**call, "l1_weights": None}))
        heard["flag"] = outcome(lambda: mm.fp8_mega_moe(**call, fast_math=[]))
        heard["exact"] = outcome(lambda: mm.fp8_mega_moe(**call, fast_math=False))
        raw = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
        given = {**call, "l1_weights": None}
        del given["y"]
        heard["raw, no weights"] = outcome(lambda: mega_moe_from_bf16(*raw, **given))
    _admit.collectively = _kernel_set.collectively = collective
    it.destroy()
    return heard


def packed(shape: MoEShape, capacity: int) -> tuple[SymmBuffer, dict[str, object]]:
    """A buffer whose kernels load, and the arguments of its calls but for the output; their weights are MXFP4."""
    it = SymmBuffer(shape, capacity, torch.device("cpu"), dist.group.WORLD)
    own = make_weights(MoEShape(256, 128, shape.experts // it.ranks, 2), "cpu", weights=MXFP4)
    l1, l2 = mm.transform_weights_for_mega_moe_sm90(own.l1, own.l2)
    return it, {"l1_weights": l1, "l2_weights": l2, "sym_buffer": it}


def rows(tokens: int) -> torch.Tensor:
    return torch.zeros(tokens, 256, dtype=torch.bfloat16)


def expansions(world: World) -> dict[str, object]:
    """First calls of few tokens and many, where the last rank has no memory to expand weights in, and then has it."""
    it, call = packed(SHAPE, 1024)
    launched: list[str] = []
    it.launch = lambda plan, *_: launched.append(plan.kernel.spec.variant.value)
    last, heard = world.rank == world.ranks - 1, {}

    def empty(*sizes: Any, **options: Any) -> torch.Tensor:
        if last and sizes == (EXPANDED,):
            raise torch.OutOfMemoryError("no room\nmore")
        return EMPTY(*sizes, **options)

    torch.empty = empty
    heard["full"] = outcome(lambda: mm.fp8_mega_moe(rows(3), **call))
    heard["bound"] = len(it.kernels.bound)
    torch.empty = EMPTY
    heard["room"] = outcome(lambda: mm.fp8_mega_moe(rows(1000 if last else 3), **call))
    heard["bytes"] = it.kernels.expanded.memory.numel()
    collectives = _admit.collectively, _kernel_set.collectively
    _admit.collectively = _kernel_set.collectively = lambda *_: 1 / 0
    heard["alone"] = outcome(lambda: mm.fp8_mega_moe(rows(3 if last else 1000), **call))
    _admit.collectively, _kernel_set.collectively = collectives
    it.destroy()
    return {**heard, "launched": launched}


def thresholds(world: World) -> dict[str, object]:
    """First calls where a setting has one rank take another variant than any count of so small a buffer would."""
    it, call = packed(MoEShape(256, 128, 16, 2), 128)
    launched: list[str] = []
    it.launch = lambda plan, *_: launched.append(plan.kernel.spec.variant.value)
    with override(cooperative_threshold=2):
        said = outcome(lambda: mm.fp8_mega_moe(rows(1 + 2 * world.rank), **call))
    it.destroy()
    return {"said": said, "launched": launched}


def allocations(world: World) -> list[str]:
    """What each rank hears when the memory of the last one is full."""
    pin_nothing(refuse=world.rank == world.ranks - 1)
    heard = [outcome(buffer)]
    rows = 4095 if world.rank else 4096
    return [*heard, outcome(lambda: SymmBuffer(SHAPE, 128, torch.device("cpu"), dist.group.WORLD, rows))]


def on_rank(world: World) -> dict[str, object]:
    """All of them in one process: most of the time goes into its start."""
    without_a_gpu()
    steps = (first_calls, prepared_calls, expansions, thresholds, allocations)
    return {each.__name__: each(world) for each in steps}


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Any]]:
    """What each of two ranks heard."""
    with forked():
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
    assert last["no weights"].startswith("ConfigError: l1"), "the others do not come to refuse it too"
    assert last["flag"].startswith("ConfigError: fast_math = [] "), last["flag"]
    assert last["exact"] == "RankMismatchError: a collective", "other kernels than those that are prepared"
    assert last["raw, no weights"] == "RankMismatchError: a collective", "the first call that stages its inputs"


def test_memory_to_expand_weights_in_is_there_on_all_ranks_or_on_none(heard: list[dict[str, Any]]):
    other, own = (rank["expansions"] for rank in heard)
    assert own["full"].startswith("ConfigError: 2 experts of MoEShape(")
    assert f"need {EXPANDED} bytes to expand their weights in: no room; allowed: " in own["full"]
    assert own["full"].endswith("or a buffer for fewer tokens, which needs none")
    assert other["full"] == f"MegaMoeError: preparing the kernels failed on rank 1: {own['full']}"
    for rank in (other, own):
        assert (rank["bound"], rank["room"], rank["alone"]) == (0, "nothing", "nothing")
        assert rank["bytes"] == EXPANDED, "also where only few tokens came"
    assert (other["launched"], own["launched"]) == (["decode", "prefill"], ["prefill", "decode"])


def test_ranks_that_a_threshold_sets_apart_have_the_same_kernels(heard: list[dict[str, Any]]):
    said = [(rank["thresholds"]["said"], rank["thresholds"]["launched"]) for rank in heard]
    assert said == [("nothing", ["decode"]), ("nothing", ["wide"])]


def test_memory_that_one_rank_lacks_is_an_error_on_all(heard: list[dict[str, Any]]):
    others, owns = (rank["allocations"] for rank in heard)
    assert owns[0].startswith("ConfigError: a buffer for 128 tokens of MoEShape(")
    assert owns[0].endswith(" bytes: no room for page-locked memory; allowed: fewer tokens per rank")
    assert others[0] == f"MegaMoeError: allocating the buffer failed on rank 1: {owns[0]}"
    assert owns[1] == "ConfigError: max_pool_rows = 4095 is not supported; allowed: 4096 or more"
    assert others[1] == f"MegaMoeError: checking the layer failed on rank 1: {owns[1]}"
