"""A call on the host: what reaches the kernel, which plans and weights are remembered, what the streams see in order.

The buffer and its kernels are the real ones, in the memory of the CPU.  torch's CUDA, the loader, the launcher and the
encoder of tensor maps are stand-ins of `Cuda`, which keeps account of them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._check.verify import function_of
from megamoe_jit._device.params import Params, StageParams
from megamoe_jit._layer import bound_kernel as _bound_kernel
from megamoe_jit._layer import kernel_set as _kernel_set
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer import stage_kernel as _stage_kernel
from megamoe_jit._layer import stream_order as _stream_order
from megamoe_jit._layer import workspace as _workspace
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.kernel_set import sort_blocks
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.abi import Wait
from megamoe_jit._spec.any_layer import StageFormat
from megamoe_jit._spec.formats import FP8

SHAPE = MoEShape(256, 128, 4, 2)
DRAWN = make_weights(SHAPE, "cpu")
L1, L2 = mm.transform_weights_for_mega_moe_sm90(DRAWN.l1, DRAWN.l2)
STATS = torch.zeros(4, dtype=torch.int32)
HERE, OTHER_DEVICE, SMS = torch.device("cpu"), 1, 132
GARBAGE = 0xA5  #: what fresh memory holds


class Stream(NamedTuple):
    name: str
    cuda_stream: int
    events: list[tuple]

    def wait_stream(self, other: Stream) -> None:
        self.events.append(("wait", self.name, other.name))


class Launch(NamedTuple):
    """What the driver got: the kernel, the blocks, and the parameters of that moment."""

    spec: KernelSpec
    grid: int
    params: Any


class Cuda:
    """Stands in for the GPU, its driver and torch's CUDA; `events` is what the streams see, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple] = []
        self.launches: list[Launch] = []
        self.stages: list[Launch] = []
        self.a, self.b = Stream("A", 0, self.events), Stream("B", 16, self.events)
        self.stream, self.current, self.capturing = self.a, HERE.index, False
        self.captures: dict[int, int] = {}  #: by stream
        self.free, self.reserved, self.allocated, self.out_of_memory = 1 << 40, 0, 0, False
        self.pinned, self.sides = 0, (1, 2, 3, 4, 5)
        self.kernel: Callable[[Params], None] = lambda params: None
        self.stage: Callable[[StageParams, StageFormat], None] = lambda params, form: None
        real_empty, real_zeros = torch.empty, torch.zeros

        def empty(*sizes: object, **more: object) -> torch.Tensor:
            if self.out_of_memory:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB\nmore")
            made = real_empty(*sizes, **more)
            return made.fill_(GARBAGE) if made.dtype is torch.uint8 else made

        def zeros(*sizes: object, pin_memory: bool = False, **more: object) -> torch.Tensor:
            made = real_zeros(*sizes, **more)
            self.pinned = made.data_ptr() if pin_memory else self.pinned
            return made

        def use(memory: torch.Tensor, stream: Stream) -> None:
            self.events.append(("use", stream.name, memory.data_ptr()))

        _stage_kernel.stage_kernel.cache_clear()
        for owner, name, stand_in in (
            (torch, "empty", empty),
            (torch, "zeros", zeros),
            (torch.Tensor, "record_stream", use),
            (torch.cuda, "device", self.device),
            (torch.cuda, "current_stream", lambda device: self.stream),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_current_stream_capturing", lambda: self.capturing and self.current == HERE.index),
            (torch.cuda, "synchronize", lambda device: self.events.append(("synchronize",))),
            (torch.cuda, "mem_get_info", lambda device: (self.free, 1 << 50)),
            (torch.cuda, "empty_cache", lambda: self.events.append(("empty cache",))),
            (torch.cuda, "memory_reserved", lambda device: self.reserved),
            (torch.cuda, "memory_allocated", lambda device: self.allocated),
            (torch.cuda, "get_device_name", lambda device: "a GPU that nobody measured"),
            (torch._C, "_cuda_getDevice", lambda: self.current),
            (torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream.cuda_stream),
            (_memory, "check_device", lambda device: None),
            (_stream_order, "capture_id", lambda stream: self.captures.get(stream)),
            (_kernel_set, "sm_count", lambda device: SMS),
            (_stage_kernel, "sm_count", lambda device: SMS),
            (_bound_kernel, "sides_of_sms", lambda device: self.sides),
            (_bound_kernel, "load_kernel", self.load),
            (_bound_kernel, "Launcher", self.launcher),
            (_bound_kernel, "encode_fp8_rows", encode),
            (_stage_kernel, "load_kernel", self.load),
            (_stage_kernel, "Launcher", self.stager),
            (_workspace, "_named", weakref.WeakValueDictionary()),
        ):
            monkeypatch.setattr(owner, name, stand_in, raising=False)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    def load(self, spec: KernelSpec, index: int | None, *, param_bytes: int) -> SimpleNamespace:
        assert (index, param_bytes) == (
            self.current,
            ctypes.sizeof(Params if "stage" not in spec.kernel_name else StageParams),
        )
        assert not self.capturing, "kernels are not loaded in a capture"
        return SimpleNamespace(spec=spec, key=spec.kernel_name)

    def launcher(self, loaded: SimpleNamespace, params: Params, *, threads: int) -> SimpleNamespace:
        assert threads == loaded.spec.threads

        def launch(grid: int, stream: int) -> None:
            assert self.current == HERE.index, "as the driver wants it"
            self.events.append(("launch", {s.cuda_stream: s.name for s in (self.a, self.b)}[stream]))
            self.launches.append(Launch(loaded.spec, grid, Params.from_buffer_copy(params)))
            self.kernel(self.launches[-1].params)

        return SimpleNamespace(launch=launch)

    def stager(self, loaded: SimpleNamespace, params: StageParams, **how: object) -> SimpleNamespace:
        assert how == {"threads": 256, "cooperative": False}

        def launch(grid: int, stream: int) -> None:
            assert self.current == HERE.index, "as the driver wants it"
            self.events.append(("stage", {s.cuda_stream: s.name for s in (self.a, self.b)}[stream]))
            self.stages.append(Launch(loaded.spec, grid, StageParams.from_buffer_copy(params)))
            self.stage(self.stages[-1].params, loaded.spec.kind)

        return SimpleNamespace(launch=launch)


def encode(target: ctypes.Structure, *given: int) -> None:
    """A tensor map that can be read: address, rows, columns, rows of a box."""
    target.opaque[:4] = given


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.fixture
def buffer(cuda: Cuda) -> SymmBuffer:
    it = SymmBuffer(SHAPE, 128, HERE)
    cuda.events.clear()
    return it


def call(buffer: SymmBuffer, tokens: int = 3, function: Callable = mm.fp8_mega_moe, **changed: object) -> torch.Tensor:
    y = torch.empty(tokens, buffer.hidden, dtype=torch.bfloat16)
    l1, l2 = changed.pop("l1", L1), changed.pop("l2", L2)
    given = {"y": y, "l1_weights": l1, "l2_weights": l2, "sym_buffer": buffer, **changed}
    function(**given)
    return given["y"]


def clones() -> list[torch.Tensor]:
    """The weights again, which are as they were, but have no mark of it before they get one."""
    tensors = [tensor.clone() for tensor in (*L1, *L2)]
    mm.mark_transformed(tensors[:2], tensors[2:])
    return tensors


def refused(action: Callable, *says: str, kind: type[Exception] = mm.ConfigError) -> None:
    with pytest.raises(kind) as caught:
        action()
    for part in says:
        assert part in str(caught.value)


def addresses(params: Params) -> list[int]:
    """Where the kernel reads codes and scales of `l1`, then of `l2`."""
    return [params.weight1, params.weight1_scales, params.weight2, params.weight2_scales]


def test_a_kernel_knows_its_memory(cuda: Cuda):
    """The pools are rings here: 4096 rows of more."""
    it = SymmBuffer(SHAPE, 4096, HERE, None, 4096)
    with override(timeout_s=7.5):
        call(it)
    params, layout, local = cuda.launches[0].params, it.layout, it.local.data_ptr()
    assert (layout.rows, layout.pool_rows) == (8704, 4096)
    assert (params.pool_rows, params.counters) == (4096, 8704 // 64)
    assert (params.rank, params.fault, params.timeout_ns) == (0, cuda.pinned, 7_500_000_000)
    assert params.peers[:] == [it.buffer.data_ptr(), *[0] * 7]
    assert {s.name: getattr(params, s.name) for s in layout.symmetric} == {s.name: s.offset for s in layout.symmetric}
    assert {s.name: getattr(params, s.name) - local for s in layout.local} == {s.name: s.offset for s in layout.local}
    maps = {name: getattr(params, name).opaque[:4] for name in ("act1", "act2", "act1_small", "act2_small")}
    assert maps == {
        "act1": [params.act1_pool, 4096, 256, 64],
        "act2": [params.act2_pool, 4096, 128, 64],
        "act1_small": [params.act1_pool, 4096, 256, 16],
        "act2_small": [params.act2_pool, 4096, 128, 16],
    }
    assert addresses(params) == [tensor.data_ptr() for tensor in (*L1, *L2)]


def test_every_call_brings_its_own_values(cuda: Cuda):
    it = SymmBuffer(SHAPE, 4096, HERE)
    options = {"cumulative_local_expert_recv_stats": STATS, "activation_clamp": 2.5, "num_sms": 60}
    outputs = [call(it, 4096, **options, variant="pingpong"), call(it, 5, variant="pingpong")]
    one, two = cuda.launches
    assert [launch.params.y for launch in cuda.launches] == [y.data_ptr() for y in outputs]
    assert (one.grid, one.params.tokens, one.params.stats, one.params.clamp) == (60, 4096, STATS.data_ptr(), 2.5)
    assert (two.grid, two.params.tokens, two.params.stats, two.params.clamp) == (SMS, 5, 0, math.inf)
    assert (one.params.lag_tiles, one.params.item_shift, one.params.sort_blocks) == (120, 3, 16)
    assert (two.params.lag_tiles, two.params.item_shift, two.params.sort_blocks) == (264, 0, 1)


def plan_of(params: Params) -> tuple[int, ...]:
    """What calls of one plan have in common."""
    return params.lag_tiles, params.item_shift, params.sort_blocks, params.want_sides


def test_calls_of_several_plans_in_turns_bring_their_own(cuda: Cuda):
    it = SymmBuffer(SHAPE, 4096, HERE)
    for tokens in (4096, 5, 4096, 4096, 5):
        call(it, tokens, variant="pingpong")
    one, two, *again = [plan_of(launch.params) for launch in cuda.launches]
    assert one != two
    assert again == [one, one, two]


def test_an_interrupted_change_of_plans_is_made_again(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    it = SymmBuffer(SHAPE, 4096, HERE)
    for tokens in (4096, 5, 4096):
        call(it, tokens, variant="pingpong")
    one = plan_of(cuda.launches[0].params)
    (kernel,) = it.kernels.bound.values()

    class Interrupted:
        """Parameters of which only the first can be set."""

        def __setattr__(self, name: str, value: int) -> None:
            setattr(params, name, value)
            raise KeyboardInterrupt

    params = kernel.params
    with monkeypatch.context() as during:
        during.setattr(kernel, "params", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            call(it, 5, variant="pingpong", num_sms=60)
    assert plan_of(params) != one
    call(it, 4096, variant="pingpong")
    assert plan_of(cuda.launches[-1].params) == one


def test_pairs_are_sorted_by_as_many_blocks_as_they_fill(cuda: Cuda):
    it = SymmBuffer(SHAPE, 4096, HERE)
    cases = ((0, None), (192, None), (193, None), (3073, None), (4096, 3))
    assert [it.plan(tokens, None, True, sms).sort_blocks for tokens, sms in cases] == [1, 1, 2, 16, 3]
    assert [sort_blocks(pairs) for pairs in (16 * 2048, 16 * 2048 + 1, 1 << 30)] == [16, 17, 128]


def test_sides_are_used_where_every_sm_has_a_block(cuda: Cuda):
    it = SymmBuffer(SHAPE, 128, HERE)
    call(it), call(it, num_sms=SMS - 1)
    both, fewer = (launch.params for launch in cuda.launches)
    assert [*both.side_of_sm] == [*fewer.side_of_sm] == [1, 2, 3, 4, 5]
    assert (both.want_sides, fewer.want_sides) == (1, 0), "fewer blocks than SMs fall unevenly on the sides"


@pytest.mark.parametrize("wanted", [True, False])
def test_without_known_sides_there_are_none(cuda: Cuda, wanted: bool):
    cuda.sides = None if wanted else cuda.sides
    with override(l2_sides=wanted):
        call(SymmBuffer(SHAPE, 128, HERE))
    assert ([*cuda.launches[0].params.side_of_sm], cuda.launches[0].params.want_sides) == ([0] * 5, 0)


@pytest.mark.parametrize("variant", [Variant.PINGPONG, Variant.COOPERATIVE])
def test_forcing_a_variant_passes_everything_on(cuda: Cuda, buffer: SymmBuffer, variant: Variant):
    stats = {"cumulative_local_expert_recv_stats": STATS}
    force = function_of(mm, variant.value)
    for fast in (False, True):
        y = call(buffer, function=force, **stats, activation_clamp=2.5, fast_math=fast, num_sms=60)
        spec, grid, params = cuda.launches[-1]
        assert (spec, grid) == (KernelSpec(SHAPE, variant, 1, fast), 60)
        assert (params.y, params.stats, params.clamp) == (y.data_ptr(), STATS.data_ptr(), 2.5)


@pytest.mark.parametrize("which", range(4))
def test_weights_at_a_known_address_are_checked_unless_they_are_the_same_tensors(
    cuda: Cuda, buffer: SymmBuffer, which: int
):
    call(buffer)
    tensors = [*L1, *L2]
    tensors[which] = tensors[which].flatten()
    refused(lambda: call(buffer, l1=tensors[:2], l2=tensors[2:]), "has shape")
    assert len(cuda.launches) == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_a_slice_of_the_experts_of_a_bigger_tensor_is_taken(cuda: Cuda, buffer: SymmBuffer, inplace: bool):
    """Scales of one expert may be 4 bytes, and the kernel reads them one by one: it is no matter where they start."""
    big = make_weights(MoEShape(256, 128, 7, 2), "cpu")
    cut = [tuple(tensor[3:] for tensor in pair) for pair in (big.l1, big.l2)]
    assert cut[1][1].data_ptr() % 16 == 8
    l1, l2 = mm.transform_weights_for_mega_moe_sm90(*cut, inplace=inplace)
    call(buffer, l1=l1, l2=l2)
    assert addresses(cuda.launches[-1].params) == [tensor.data_ptr() for tensor in (*l1, *l2)]
    before = [tuple(tensor[2:] for tensor in pair) for pair in mm.transform_weights_for_mega_moe_sm90(*whole_of(6))]
    call(buffer, l1=before[0], l2=before[1])  # cut after the transform


def whole_of(experts: int) -> tuple[WeightTensors, WeightTensors]:
    weights = make_weights(MoEShape(256, 128, experts, 2), "cpu")
    return weights.l1, weights.l2


def test_codes_that_start_elsewhere_are_refused_with_the_next_step(cuda: Cuda, buffer: SymmBuffer):
    memory = torch.zeros(L1[0].numel() + 8, dtype=torch.uint8)
    codes = memory[8:].view(torch.float8_e4m3fn).view(L1[0].shape)
    (w13, sf1), l2 = mm.transform_weights_for_mega_moe_sm90((codes, L1[1]), DRAWN.l2)
    call(buffer, l1=(w13, sf1), l2=l2)
    assert w13.data_ptr() % 16 == 0
    there = mm.transform_weights_for_mega_moe_sm90((codes, L1[1]), (DRAWN.l2[0].clone(), DRAWN.l2[1]), inplace=True)
    refused(
        lambda: call(buffer, l1=there[0], l2=there[1]),
        "l1 weights starts at",
        "a multiple of 16, which a transform that is not in place gives",
    )
    assert len(cuda.launches) == 1


@pytest.mark.parametrize("which", range(4))
def test_replaced_data_of_weights_is_seen(cuda: Cuda, buffer: SymmBuffer, which: int):
    tensors, other = (clones() for _ in range(2))
    again = other[which]

    def go() -> None:
        call(buffer, l1=tuple(tensors[:2]), l2=tuple(tensors[2:]))

    go()
    tensors[which].data = again[:2].clone()
    refused(go, "has shape (2, ")
    assert len(cuda.launches) == 1
    tensors[which].data = again
    go()
    assert addresses(cuda.launches[1].params) == [tensor.data_ptr() for tensor in tensors]
    assert addresses(cuda.launches[1].params)[which] == again.data_ptr()


def test_other_settings_mean_other_plans(cuda: Cuda, buffer: SymmBuffer):
    first = buffer.plan(3, None, True, None)
    assert buffer.plan(3, None, True, None) is first
    with override(variant="cooperative"):
        assert buffer.plan(3, None, True, None).kernel.spec.variant is Variant.COOPERATIVE
    assert buffer.plan(3, None, True, None).kernel is first.kernel
    assert first.kernel.spec.variant is Variant.PINGPONG


def test_a_plan_is_of_its_own_variant_mathematics_and_blocks(cuda: Cuda, buffer: SymmBuffer):
    for variant, fast, sms in itertools.product(Variant.reading(FP8), (True, False), (SMS, 60)):
        plan = buffer.plan(3, variant.value, fast, sms)
        assert (plan.kernel.spec, plan.num_sms) == (KernelSpec(SHAPE, variant, 1, fast), sms)


def test_plans_that_are_remembered_have_a_limit(cuda: Cuda, buffer: SymmBuffer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_kernel_set, "MAX_PLANS", 4)
    for tokens in range(12):
        assert buffer.plan(tokens, None, True, None) is buffer.plan(tokens, None, True, None)
        assert len(buffer.kernels._plans) <= 4


def test_a_destroyed_buffer_is_refused(cuda: Cuda, buffer: SymmBuffer):
    call(buffer)
    buffer.destroy()
    for use in (lambda: call(buffer), lambda: call(buffer, 4), lambda: buffer.prepare("pingpong")):
        refused(use, "this buffer was destroyed")
    assert len(cuda.launches) == 1


def test_a_buffer_whose_kernel_failed_is_refused_with_that_error(cuda: Cuda, buffer: SymmBuffer):
    call(buffer)
    buffer.fault[:4] = torch.tensor([Wait.PEER_SIGNAL | 2 << 8, 0, 5, 0b10])
    refused(buffer.check, "missing: rank 1", kind=mm.PeerTimeoutError)
    for use in (lambda: call(buffer), lambda: call(buffer, 4), lambda: buffer.prepare("pingpong")):
        refused(use, "unusable since an earlier call failed", "missing: rank 1", kind=mm.PeerTimeoutError)
    assert len(cuda.launches) == 1


def uses(buffer: SymmBuffer, stream: str) -> list[tuple]:
    """The stream keeps both memories from being given away."""
    return [("use", stream, memory.data_ptr()) for memory in (buffer.local, buffer.buffer)]


def test_a_call_on_another_stream_waits_for_the_last_one(cuda: Cuda, buffer: SymmBuffer):
    call(buffer)
    call(buffer, 4)
    assert cuda.events == [*uses(buffer, "A"), ("launch", "A"), ("launch", "A")]
    cuda.events.clear()
    cuda.stream = cuda.b
    call(buffer)
    call(buffer, 4)
    assert cuda.events == [("wait", "B", "A"), *uses(buffer, "B"), ("launch", "B"), ("launch", "B")]


def test_a_capture_orders_nothing_and_is_no_last_call(cuda: Cuda, buffer: SymmBuffer):
    call(buffer)
    cuda.events.clear()
    cuda.stream, cuda.capturing = cuda.b, True
    buffer.wait_for_last()
    call(buffer)
    assert cuda.events == [("launch", "B")]
    cuda.capturing = False
    call(buffer)
    assert cuda.events[1:] == [("wait", "B", "A"), *uses(buffer, "B"), ("launch", "B")]


@contextmanager
def captured(cuda: Cuda, **branches: int) -> Iterator[None]:
    """Streams, by name, are captured into graphs that have a number."""
    cuda.capturing, cuda.captures = True, {getattr(cuda, name).cuda_stream: graph for name, graph in branches.items()}
    yield
    cuda.capturing, cuda.captures, cuda.stream = False, {}, cuda.a


def calls_on(cuda: Cuda, buffer: SymmBuffer, *streams: Stream) -> list[tuple]:
    """What the streams see of calls, one on each."""
    cuda.events.clear()
    for cuda.stream in streams:
        call(buffer)
    return [event for event in cuda.events if event[0] != "use"]


@pytest.mark.parametrize("before", ["nothing", "a", "b"])
def test_branches_of_a_graph_take_turns(cuda: Cuda, buffer: SymmBuffer, before: str):
    """Whether or not the stream on which it begins is that of the last call outside, which needs no word."""
    buffer.prepare_all()
    if before != "nothing":
        calls_on(cuda, buffer, getattr(cuda, before))
    turns = [("launch", "A"), ("wait", "B", "A"), ("launch", "B"), ("launch", "B"), ("wait", "A", "B"), ("launch", "A")]
    for graph in (7, 8):
        with captured(cuda, a=graph, b=graph):
            found = calls_on(cuda, buffer, cuda.a, cuda.b, cuda.b, cuda.a)
        if before == "b":  # which may have launched in this graph, for all that is known
            assert found == [("wait", "A", "B"), *turns]
        else:
            assert found == turns


def test_staging_on_a_branch_waits_for_the_other(cuda: Cuda, buffer: SymmBuffer):
    buffer.prepare_all()
    with captured(cuda, a=1, b=1):
        calls_on(cuda, buffer, cuda.a)
        cuda.stream = cuda.b
        buffer.wait_for_last()
        assert cuda.events[-1] == ("wait", "B", "A")
        assert calls_on(cuda, buffer, cuda.b) == [("launch", "B")]


def test_graphs_that_are_captured_at_once_do_not_wait_for_each_other(cuda: Cuda, buffer: SymmBuffer):
    buffer.prepare_all()
    with captured(cuda, a=1, b=2):
        assert calls_on(cuda, buffer, cuda.a, cuda.b, cuda.a) == [("launch", name) for name in "ABA"]


def test_calls_after_a_capture_are_ordered_after_the_last_one_outside_of_it(cuda: Cuda, buffer: SymmBuffer):
    calls_on(cuda, buffer, cuda.a)
    with captured(cuda, a=1, b=1):
        calls_on(cuda, buffer, cuda.b)
    assert calls_on(cuda, buffer, cuda.a, cuda.a) == [("launch", "A")] * 2
    with captured(cuda, b=2):
        assert calls_on(cuda, buffer, cuda.b) == [("launch", "B")]
    assert calls_on(cuda, buffer, cuda.b) == [("wait", "B", "A"), ("launch", "B")]
    assert len(buffer.order._last.captured) == 1, (
        "graphs that are done with are forgotten when the next one is captured"
    )


def test_the_device_of_the_buffer_is_entered_and_left(cuda: Cuda, buffer: SymmBuffer):
    cuda.current = OTHER_DEVICE
    call(buffer)
    cuda.stream, cuda.capturing = cuda.b, True
    buffer.wait_for_last()
    call(buffer)
    assert cuda.events == [*uses(buffer, "A"), ("launch", "A"), ("launch", "B")]
    assert cuda.current == OTHER_DEVICE


def test_with_all_kernels_prepared_a_capture_may_pick_any(cuda: Cuda, buffer: SymmBuffer):
    buffer.prepare_all()
    cuda.capturing = True
    with override(cooperative_threshold=64):
        call(buffer, 3)
        call(buffer, 100)
    assert [each.spec.variant for each in cuda.launches] == [Variant.PINGPONG, Variant.COOPERATIVE]


def test_a_call_that_comes_after_the_end_in_another_thread_is_refused(cuda: Cuda, buffer: SymmBuffer):
    plan = buffer.plan(3, None, True, None)
    y = torch.empty(3, buffer.hidden, dtype=torch.bfloat16)
    buffer.destroy()
    refused(lambda: buffer.launch(plan, y=y, tokens=3, l1=L1, l2=L2, stats=None, clamp=1.0), "was destroyed")
    assert cuda.launches == []


def test_an_interrupted_change_of_weights_is_made_again(cuda: Cuda, buffer: SymmBuffer, monkeypatch):
    call(buffer)
    tensors = clones()
    other = [tuple(tensors[:2]), tuple(tensors[2:])]

    class Interrupted:
        """Parameters of which only the first address can be set."""

        def __init__(self, params: Params) -> None:
            self.__dict__["params"] = params

        def __setattr__(self, name: str, value: int) -> None:
            setattr(self.params, name, value)
            if name == "weight1":
                raise KeyboardInterrupt

    with monkeypatch.context() as during:
        for kernel in buffer.kernels.bound.values():
            during.setattr(kernel, "params", Interrupted(kernel.params))
        with pytest.raises(KeyboardInterrupt):
            call(buffer, l1=other[0], l2=other[1])
    half_set = [kernel.params.weight1 for kernel in buffer.kernels.bound.values()]
    assert other[0][0].data_ptr() in half_set
    call(buffer)
    assert addresses(cuda.launches[-1].params) == [tensor.data_ptr() for tensor in (*L1, *L2)]
