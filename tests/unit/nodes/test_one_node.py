"""What a buffer over nodes asks of the layer: on one node, the launch of `fp8_mega_moe` and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megamoe_jit as mm
from megamoe_jit._check.weights import make_weights
from megamoe_jit._errors import PeerTimeoutError
from megamoe_jit._nodes.along_rails import ExactExchange, GatherExchange
from megamoe_jit._nodes.choice import Choices, Rule
from megamoe_jit._nodes.exchange import Batch, Rows
from megamoe_jit._nodes.experts import CallOptions
from megamoe_jit._nodes.rail import TorchRail
from megamoe_jit._nodes.watch import UNASKED, RailLost, Watch, wait_until
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MXFP4, Variant
from megamoe_jit._spec.numerics import Numerics
from tests.unit.layer.test_calls import DRAWN, HERE, L1, L2, SHAPE, Cuda, refused
from tests.unit.layer.test_moe import compute, expected, inputs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    it = Cuda(monkeypatch)
    it.kernel = compute
    return it


class Echo:
    """The rail of a second node that has nothing of its own: all masked there, and zeros back."""

    nodes, node, timeout_s = 2, 0, 60.0

    def gather(self, outputs, inputs) -> None:
        for output, given in zip(outputs, inputs, strict=True):
            rows = given.shape[0]
            output[:rows].copy_(given)
            output.view(torch.uint8)[rows:].fill_(255)  # ids are -1 then

    def swap(self, output, given, arriving=None, leaving=None) -> None:
        mine = given.shape[0] // 2 if leaving is None else leaving[0]
        output[:mine].copy_(given[:mine])
        output[mine:].zero_()

    def counts(self, mine):
        return lambda: [mine.tolist(), [0, 0]]

    def error(self, device) -> None:
        return None

    def abort(self, device) -> None:
        pass


class Made(TorchDispatchMode):
    """Notes the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, given=(), options=None):
        self.names.append(str(function).split(".")[1])
        return function(*given, **(options or {}))


def buffer_of(nodes: int, exchange=GatherExchange, max_tokens: int = 128, **more) -> mm.MultiNodeBuffer:
    topology = SimpleNamespace(
        group=None, node_group=None, nodes=nodes, node=0, ranks_per_node=1, local_rank=0, world_size=nodes, rank=0,
        roll_call=SimpleNamespace(calls=0, give_notice=lambda: None, missing=lambda: {1: "its process is gone"}),
        place_of=lambda rank: f"node {rank} (rank {rank})",
    )  # fmt: skip
    shape = mm.MoEShape(SHAPE.hidden, SHAPE.intermediate, SHAPE.experts * nodes, SHAPE.topk)
    choices = Choices([exchange(Echo())], Echo(), Rule(shape, nodes, 1, exchange.name))
    return mm.MultiNodeBuffer(topology, shape, max_tokens, HERE, choices, **more)


def stage(buffer, given) -> None:
    x, ids, weights = given
    codes, scales = mm.quantize_activations(x)
    views = buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights
    for view, value in zip(views, (codes, scales, ids, weights), strict=True):
        view[: len(x)].copy_(value)


def test_one_node_is_the_launch_of_the_node_and_nothing_else(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    """Nothing is copied, filled or sent: neither rail nor masks, and the caller's views are the kernel's."""
    buffer = buffer_of(1, partial=torch.float32)
    given = inputs(5)
    stage(buffer, given)
    y, plain = torch.empty(5, 256, dtype=torch.bfloat16), torch.empty(5, 256, dtype=torch.bfloat16)
    mm.fp8_mega_moe_multinode(y, L1, L2, buffer)
    cuda.events.clear()
    monkeypatch.setattr(torch.Tensor, "fill_", None)
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    cuda.kernel = lambda params: None
    mm.fp8_mega_moe_multinode(y, L1, L2, buffer)
    inner = buffer._experts.buffer
    mm.fp8_mega_moe(plain, L1, L2, inner)
    assert cuda.events == [("launch", "A")] * 2
    ours, theirs = cuda.launches[-2:]
    assert (ours.spec, ours.grid) == (theirs.spec, theirs.grid)
    ours.params.y = theirs.params.y
    assert bytes(ours.params) == bytes(theirs.params)
    assert torch.equal(y, expected(*given, None))
    assert buffer.x.data_ptr() == inner.x.data_ptr()


@pytest.mark.parametrize("exchange", [GatherExchange, ExactExchange])
def test_two_nodes_with_the_real_buffer(cuda: Cuda, exchange):
    buffer = buffer_of(2, exchange)
    given = inputs(5)
    stage(buffer, given)
    y = torch.empty(5, 256, dtype=torch.bfloat16)
    mm.fp8_mega_moe_multinode(y, L1, L2, buffer, 7)
    assert torch.equal(y, expected(*given, None))
    assert [launch.params.tokens for launch in cuda.launches] == [14 if exchange is GatherExchange else 5]
    assert (buffer.topk_idx[5:7] == -1).all()


@pytest.mark.parametrize("exchange", [GatherExchange, ExactExchange])
@pytest.mark.parametrize(("padded", "variant"), [(9, Variant.PINGPONG), (10, Variant.COOPERATIVE)])
def test_the_variant_is_that_of_a_ranks_rows_in_every_form(cuda: Cuda, exchange, padded: int, variant: Variant):
    """Not of those that arrive, which differ from form to form and from rank to rank."""
    cuda.kernel = lambda params: None
    buffer = buffer_of(2, exchange)
    with override(cooperative_threshold=10):
        stage(buffer, inputs(5))
        mm.fp8_mega_moe_multinode(torch.empty(5, 256, dtype=torch.bfloat16), L1, L2, buffer, padded)
        under_way = buffer.dispatch(5, padded)
        buffer.compute(under_way, L1, L2)
    assert [launch.spec.variant for launch in cuda.launches] == [variant] * 2


def test_a_rail_gives_up_before_a_kernel_does(cuda: Cuda):
    def ask(**more: object) -> mm.MultiNodeBuffer:
        sizes = (4, 8, 2, 256, 128)
        return mm.get_multinode_buffer_for_mega_moe(mm.NodeTopology(None), *sizes, device="cpu", **more)

    with override(timeout_s=5.0):
        assert ask().timeout_s == 3.0
        refused(
            lambda: ask(timeout_s=5.0), "timeout_s = 5.0 is not supported; allowed: less than a kernel's deadline, 5 s"
        )
    assert ask().timeout_s == 60.0


def test_packed_weights_are_another_kernel(cuda: Cuda):
    """Of a node as of a single one; both formats on one buffer, each prepared when it is first met."""
    cuda.kernel = lambda params: None
    packed = make_weights(SHAPE, "cpu", weights=MXFP4)
    given = mm.transform_weights_for_mega_moe_sm90(packed.l1, packed.l2)
    buffer = buffer_of(2, partial=torch.float32)
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    for l1, l2 in ((L1, L2), given):
        mm.fp8_mega_moe_multinode(y, l1, l2, buffer)
    under_way = buffer.dispatch(3)
    buffer.compute(under_way, *given)
    buffer.combine(under_way, y)
    names = [launch.spec.kernel_name for launch in cuda.launches]
    assert ["mxfp4" in name for name in names] == [False, True, True]
    assert all("f32out" in name for name in names)
    cuda.capturing = True
    with pytest.raises(mm.CaptureError, match=r"call prepare\(\) on every rank before"):
        buffer.prepare(weight_format="fp8e5m2")
    buffer.prepare(weight_format="mxfp4")


@pytest.mark.parametrize("chunks", [1, 4])
def test_what_a_call_can_take_is_prepared_however_small_its_chunks_are(cuda: Cuda, chunks: int):
    """A call's variant is that of all its rows, which can be more than a launch of a chunk has."""
    buffer = buffer_of(2, max_tokens=2048, chunks=chunks)
    buffer.prepare(weight_format="mxfp4")
    options = CallOptions(1.0, weights=MXFP4)
    cuda.capturing = True
    picked = {buffer._experts.variant_for(1 << i, options) for i in range(12)}
    assert picked == {each.value for each in Variant.reading(MXFP4)}


def test_what_the_exact_form_reads_is_made_on_the_stream_of_its_call():
    """Kept from another call, it would have to be waited for: behind what a lost rank never lets end."""
    exchange, drawn = ExactExchange(Echo()), [torch.zeros(5, 2, dtype=torch.int64) for _ in range(4)]
    made = []
    for _ in range(2):
        with Made() as here:
            exchange.dispatch(Batch(Rows(*drawn), 5), Rows(*map(torch.clone, drawn)), 0, 4)
        made.append(here.names.count("arange"))
    assert made[0] == made[1] > 0


def test_rows_are_packed_before_the_host_waits_for_counts():
    """What is enqueued after that wait, nothing hides: it is what counts decide, and no pass over the rows."""

    class Waited(Echo):
        def counts(self, mine):
            wait = super().counts(mine)
            return lambda: made.names.append("waited") or wait()

        def swap(self, *rows) -> None:
            made.names.append("swap")

    drawn = [torch.zeros(5, 2, dtype=torch.int64) for _ in range(4)]
    with Made() as made:
        ExactExchange(Waited()).dispatch(Batch(Rows(*drawn), 5), Rows(*map(torch.clone, drawn)), 0, 4)
    packed, waited, swapped = (made.names.index(name) for name in ("cat", "waited", "swap"))
    assert packed < waited < swapped
    assert set(made.names[waited + 1 : swapped]) <= {"new_empty", "slice"}


def test_counts_are_read_when_the_stream_of_their_device_has_copied_them(monkeypatch: pytest.MonkeyPatch):
    """Whichever device is the current one."""
    there = torch.device("cuda", 1)
    recorded = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    event = SimpleNamespace(record=lambda stream=None: recorded.append(stream), query=lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **more: SimpleNamespace(copy_=lambda *_, **how: None))
    TorchRail(None, 2, 0, 60.0)._to_host(SimpleNamespace(device=there, shape=(4,), dtype=torch.int64))
    assert recorded == ["stream of cuda:1"]


def test_partials_in_float32_are_another_kernel(cuda: Cuda):
    cuda.kernel = lambda params: None
    buffer = buffer_of(2, partial=torch.float32)
    mm.fp8_mega_moe_multinode(torch.empty(3, 256, dtype=torch.bfloat16), L1, L2, buffer)
    assert cuda.launches[0].spec.numerics == Numerics(float32_out=True)
    assert "f32out" in cuda.launches[0].spec.kernel_name
    assert buffer._lanes[0].partial.dtype is torch.float32


def test_a_loss_names_node_and_rank_poisons_and_destroy_asks_nobody(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    buffer = buffer_of(2)
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    mm.fp8_mega_moe_multinode(y, L1, L2, buffer)

    def broken(*_: object) -> None:
        raise RuntimeError("Connection closed by peer\nmore")

    monkeypatch.setattr(Echo, "swap", broken)
    says = "node 0 (rank 0): in call 2 between nodes, results did not get through: Connection closed by peer (missing: "
    with pytest.raises(PeerTimeoutError) as caught:
        mm.fp8_mega_moe_multinode(y, L1, L2, buffer)
    assert says + "node 1 (rank 1): its process is gone)" in str(caught.value)
    launched = len(cuda.launches)
    for action in (lambda: mm.fp8_mega_moe_multinode(y, L1, L2, buffer), lambda: buffer.dispatch(3)):
        refused(action, "this buffer is unusable since an earlier call failed", kind=PeerTimeoutError)
    inner = buffer._experts.buffer
    refused(inner.require_usable, "unusable since", kind=PeerTimeoutError)
    cuda.events.clear()
    buffer.destroy()
    buffer.destroy()
    assert ("synchronize",) not in cuda.events, "the device may never be done"
    assert len(cuda.launches) == launched
    refused(lambda: buffer.dispatch(3), "this buffer was destroyed")


def test_a_wait_of_the_host_that_found_a_loss_is_told_once(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    """Who is missing was asked while it waited, which takes seconds: nobody is asked again."""
    buffer = buffer_of(2, ExactExchange)
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    mm.fp8_mega_moe_multinode(y, L1, L2, buffer)
    watch = Watch(lambda: {1: "it stands still"}, lambda: None, timeout_s=0.01)
    monkeypatch.setattr(Echo, "counts", lambda self, mine: wait_until(lambda: False, watch))
    buffer.topology.roll_call.missing = None
    with pytest.raises(PeerTimeoutError, match=r"in call 2 .*, nothing came for 0.01 s \(missing: .*: it stands still"):
        mm.fp8_mega_moe_multinode(y, L1, L2, buffer)


@pytest.mark.parametrize("said", [RailLost("nothing came for 3 s", {1: "it stands still"}), RuntimeError("refused")])
def test_a_rank_that_is_lost_while_nodes_connect_is_named(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, said: Exception):
    def lost(*_: object) -> None:
        raise said

    buffer = buffer_of(2)
    monkeypatch.setattr(Echo, "counts", lost)
    with pytest.raises(
        PeerTimeoutError, match=r"(nothing came for 3 s|connections did not get through: refused) .*node 1"
    ):
        buffer.prepare()
    refused(buffer.prepare, "this buffer is unusable since", kind=PeerTimeoutError)


def test_a_wait_ends_with_what_it_waits_for_or_with_an_error_of_the_rail():
    asked, found = [], iter([{}, {3: "gone"}])
    over = lambda: len(asked) > 2  # noqa: E731
    wait_until(over, Watch(dict, lambda: asked.append(1), timeout_s=60.0))  # type: ignore[arg-type]
    with pytest.raises(RailLost, match="NCCL reports remote_error") as caught:
        wait_until(lambda: False, Watch(dict, lambda: "remote_error", timeout_s=60.0))
    assert caught.value.missing is UNASKED
    with pytest.raises(RailLost, match="nothing came for 0.02 s") as caught:
        wait_until(lambda: False, Watch(lambda: next(found), lambda: None, timeout_s=0.02))
    assert caught.value.missing == {3: "gone"}, "everybody was there the first time, and it was waited on"


def test_what_is_out_of_order_is_refused(cuda: Cuda):
    buffer = buffer_of(2)
    buffer.prepare()
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    under_way = buffer.dispatch(3, 4)
    refused(lambda: buffer.combine(under_way, y), "combine before compute; allowed: dispatch, compute, combine")
    refused(lambda: buffer.dispatch(3, 4), "dispatch before what was dispatched last was computed")
    buffer.compute(under_way, L1, L2)
    refused(lambda: buffer.combine(under_way, y[:2]), "y has shape (2, 256); allowed: (3, 256)")
    buffer.combine(under_way, y)
    refused(lambda: buffer.dispatch(5, 4), "tokens = 5 is not supported; allowed: 0 to 4")
    refused(lambda: buffer.dispatch(3, 129), "padded_tokens = 129 is not supported; allowed: 1 to 128")


def test_a_capture_needs_what_can_be_captured_and_what_is_prepared(cuda: Cuda):
    buffer = buffer_of(2)
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    cuda.capturing = True
    with pytest.raises(mm.CaptureError, match=r"call prepare\(\) on every rank before the capture"):
        mm.fp8_mega_moe_multinode(y, L1, L2, buffer)
    refused(
        lambda: Choices([ExactExchange(Echo())], None, Rule(SHAPE, 2, 1)).pick(4, True),
        "exact cannot be captured",
        kind=mm.CaptureError,
    )


def test_a_module_of_a_topology_goes_its_own_way(cuda: Cuda):
    calls = []

    class Lease:
        name, kind, shape, capacity, held = "nodes1", "shared", SHAPE, 128, None

        def serve(self, *arguments):
            calls.append(arguments)
            return arguments[0]

        def release(self) -> None:
            calls.append("released")

    def lease(*asked):
        calls.append(asked)
        return Lease()

    layer = mm.MegaMoE(DRAWN.l1, DRAWN.l2, topk=2, max_tokens=128, clamp=3.0, topology=SimpleNamespace(lease=lease))
    assert calls.pop() == (SHAPE, 128, HERE, "shared")
    x, ids, weights = inputs(3)
    assert layer(x, ids, weights, 9) is x
    *batch, l1, l2, clamp, fast, padded = calls.pop()
    assert batch[1] is ids
    assert (l1[0] is layer.l1[0], l2[1] is layer.l2[1], clamp, fast, padded) == (True, True, 3.0, True, 9)
    layer.destroy()
    assert calls == ["released"]
    plain = mm.MegaMoE(DRAWN.l1, DRAWN.l2, topk=2, max_tokens=128)
    refused(lambda: plain(x, ids, weights, 9), "padded_tokens = 9 without a topology; allowed: None")
    refused(lambda: mm.MegaMoE(DRAWN.l1, DRAWN.l2, topk=2, max_tokens=128, topology=3), "topology: int given")


def test_a_rail_that_a_graph_has_is_not_aborted():
    """NCCL would wait for the end of the graph, and torch for NCCL."""
    calls = []
    backend = SimpleNamespace(abort=lambda: calls.append("abort"), get_error=lambda: "ErrorType.REMOTE_ERROR")
    group = SimpleNamespace(_get_backend=lambda device: backend)
    rails = [TorchRail(group, 2, 0, 60.0) for _ in range(2)]
    Choices([GatherExchange(rails[1])], rails[1], Rule(SHAPE, 2, 1)).pick(4, True)
    for rail in rails:
        rail.abort(torch.device("cuda", 0))
    assert calls == ["abort"]
    assert rails[0].error(torch.device("cuda", 0)) == "remote_error"
    backend.get_error = lambda: "ErrorType.SUCCESS"
    assert rails[0].error(torch.device("cuda", 0)) is None
