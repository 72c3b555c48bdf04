"""The layer over several nodes, whose ranks are threads: what it computes, and what travels, to the byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._nodes.calls import fp8_mega_moe_multinode
from megamoe_jit._nodes.choice import Choices
from megamoe_jit._nodes.combine import sum_nodes
from megamoe_jit._nodes.memory import staging
from megamoe_jit._nodes.model import row_bytes, sent_bytes
from megamoe_jit._nodes.overlap import overlapped
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, moe_reference
from tests.unit.nodes.world import (
    ROUTES,
    SHAPE,
    batch,
    expected,
    make_buffer,
    of_node,
    stage,
    thread_world,
    whole_weights,
)

WEIGHTS = whole_weights()
FORMS = [("gather", 1), ("gather", 3), ("exact", 1), ("exact", 3)]


def run(topology, rail, rows, *, weights=WEIGHTS, shape=SHAPE, padded=None, **more):
    """One call on this rank; its output, and the buffer."""
    buffer = make_buffer(topology, rail, shape=shape, **{"capacity": 12, **more})
    l1, l2 = of_node(weights, buffer.first_expert, buffer.local_experts)
    buffer.prepare()
    rail.ledger.sent[rail.rank].clear()
    stage(buffer, rows)
    y = torch.full((len(rows), shape.hidden), float("nan"), dtype=torch.bfloat16)
    fp8_mega_moe_multinode(y, l1, l2, buffer, padded)
    return y, buffer


def ragged(rank: int) -> int:
    """Tokens of a rank: none, one, some, all that there is room for."""
    return (0, 1, 7, 12)[rank % 4]


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("partial", [torch.bfloat16, torch.float32])
def test_every_route_has_the_bits_that_the_definition_says(nodes, ranks_per_node, partial):
    """In either form, in one piece or in chunks: so these have each other's bits too."""

    def action(topology, rail, _):
        wrong = []
        for number, route in enumerate(ROUTES):
            rows = batch(ragged(topology.rank + number), route, seed=topology.rank, nodes=nodes)
            right = expected(rows, WEIGHTS, nodes, partial)
            for exchange, chunks in FORMS:
                y, _ = run(topology, rail, rows, exchange=exchange, partial=partial, chunks=chunks)
                wrong += [] if torch.equal(y, right) else [(route, exchange, chunks)]
        return wrong

    assert thread_world(nodes, ranks_per_node, action) == [[]] * (nodes * ranks_per_node)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("parts", "total"),
    [
        ([2.0**24, 1.0, -(2.0**24)], 0.0),  # 1 is lost in the first sum of FP32
        ([-(2.0**24), 2.0**24, 1.0], 1.0),
        ([256.0, 1.0, 1.0], 258.0),  # in bf16 each 1 would be lost
        ([256.0, 1.0, -256.0, 0.5], 1.5),
        ([256.0, 1.0], 256.0),  # rounded once, at the end
    ],
)
def test_nodes_are_summed_in_order_in_fp32_and_rounded_once(dtype: torch.dtype, parts: list[float], total: float):
    partials = torch.tensor(parts).to(dtype)[:, None, None].expand(-1, 3, 128).contiguous()
    y = torch.empty(2, 128, dtype=torch.bfloat16)
    sum_nodes(partials, y)
    assert (y == total).all()


def test_how_far_it_is_from_one_domain():
    def action(topology, rail, _):
        rows = batch(12, "spread", seed=topology.rank)
        whole = moe_reference(*rows.tensors, WEIGHTS.l1, WEIGHTS.l2, out_dtype=torch.float32)
        outputs = {p: run(topology, rail, rows, partial=p)[0] for p in (torch.bfloat16, torch.float32)}
        return [calc_diff(outputs[torch.bfloat16].float(), whole), calc_diff(outputs[torch.float32], whole.bfloat16())]

    for rounded, exact in thread_world(4, 1, action):
        assert rounded < 1e-5
        assert exact < 1e-7, "only roundings of the last bf16 that fall the other way"


def test_rows_past_the_tokens_are_masked_on_every_call():
    """Also those that an earlier, larger call has left."""

    def action(topology, rail, _):
        buffer = make_buffer(topology, rail)
        l1, l2 = of_node(WEIGHTS, buffer.first_expert, buffer.local_experts)
        seen = []
        for tokens, padded in ((24, None), (3, 8), (0, 24), (2, 2)):
            rows = batch(tokens, "spread", seed=tokens + 100 * topology.rank)
            stage(buffer, rows)
            y = torch.empty(tokens, SHAPE.hidden, dtype=torch.bfloat16)
            fp8_mega_moe_multinode(y, l1, l2, buffer, padded)
            size = padded or 24
            arrived = buffer._lanes[0].experts.rows.topk_idx[: 2 * size].view(2, size, -1)
            masked = (arrived[topology.node, tokens:] < 0).all()
            seen.append(bool(masked) and torch.equal(y, expected(rows, WEIGHTS, 2, torch.bfloat16)))
        return seen

    assert thread_world(2, 1, action) == [[True] * 4] * 2


def test_a_call_in_three_parts_is_the_same_call():
    def action(topology, rail, _):
        rows = batch(7, "spread", seed=topology.rank)
        whole, buffer = run(topology, rail, rows, exchange="exact")
        l1, l2 = of_node(WEIGHTS, buffer.first_expert, buffer.local_experts)
        y = torch.empty_like(whole)
        under_way = buffer.dispatch(7, 12)
        buffer.compute(under_way, l1, l2)
        buffer.combine(under_way, y)
        return torch.equal(y, whole)

    assert all(thread_world(2, 1, action))


def test_chunks_leave_blocks_to_what_travels():
    def action(topology, rail, _):
        _, buffer = run(topology, rail, batch(24, "spread", seed=0), chunks=3, capacity=24)
        return [
            (rows, options.num_sms, options.variant)
            for lane in buffer._lanes
            for rows, options in lane.experts.launches
        ]

    for launches in thread_world(2, 1, action):
        assert launches == [(16, 124, "pingpong")] * 3


class Said:
    """In place of a rule that cuts calls by their rows."""

    chunks = None

    def __call__(self, rows, capturing):
        return SimpleNamespace(chunks=2 if rows == 8 else 4 if rows == 23 else 1)


def test_the_rule_cuts_a_call_by_its_rows():
    """Not by those that there is room for, but into no larger parts than fit."""

    def action(topology, rail, _):
        buffer = make_buffer(topology, rail, chunks=3, capacity=24)
        l1, l2 = of_node(WEIGHTS, buffer.first_expert, buffer.local_experts)
        buffer.choices = Choices(list(buffer.choices.exchanges.values()), rail, Said())
        seen = {}
        for padded in (7, 8, 16, 23):
            rows = batch(5, "spread", seed=topology.rank)
            stage(buffer, rows)
            y = torch.empty(5, SHAPE.hidden, dtype=torch.bfloat16)
            fp8_mega_moe_multinode(y, l1, l2, buffer, padded)
            assert torch.equal(y, expected(rows, WEIGHTS, 2, torch.bfloat16))
            launches = [launch for lane in buffer._lanes for launch in lane.experts.launches]
            seen[padded] = [(rows, options.num_sms) for rows, options in launches]
            for lane in buffer._lanes:
                lane.experts.launches.clear()
        return seen

    for seen in thread_world(2, 1, action):
        assert seen[7] == [(14, None)], "nothing beside it"
        assert seen[8] == [(8, 124)] * 2
        assert seen[16] == [(16, 124)] * 2
        assert sorted(rows for rows, _ in seen[23]) == [14, 16, 16]


def test_a_kernel_is_launched_before_the_next_chunk_is_brought():
    """In the exact form the host waits for that chunk's counts, and the kernel is to be at work meanwhile."""
    order: list[str] = []
    note = lambda what: lambda i: order.append(f"{what} {i}")  # noqa: E731
    overlapped(3, note("bring"), note("launch"), note("finish"), None)
    assert order[:6] == ["bring 0", "launch 0", "bring 1", "finish 0", "launch 1", "bring 2"]
    assert order[6:] == ["finish 1", "launch 2", "finish 2"]


def test_the_rule_takes_one_exchange_on_every_rank():
    def action(topology, rail, _):
        buffer = make_buffer(topology, rail, exchange="auto", capacity=512)
        return [buffer.choices.pick(rows, False).name for rows in (1, 64, 512)], buffer.choices.pick(512, True).name

    names = {str(each) for each in thread_world(8, 1, action)}
    assert len(names) == 1
    assert "'gather')" in names.pop(), "in a capture nothing waits for counts"


WIDE = MoEShape(256, 128, 128, 6)


def test_a_row_has_as_many_bytes_where_it_is_staged_as_the_model_counts():
    staged = staging(WIDE, 3, torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in staged.tensors) == 3 * row_bytes(WIDE)


def test_64_ranks_and_every_byte():
    """8 nodes of 8 ranks; what each rank sends to other nodes is what the definition says, in both forms."""
    weights, tokens = whole_weights(WIDE), 2

    def action(topology, rail, ledger):
        rows = batch(tokens - topology.rank % 2, "spread", seed=topology.rank, shape=WIDE)
        sent, right = [], []
        for exchange in ("gather", "exact"):
            y, _ = run(topology, rail, rows, weights=weights, shape=WIDE, exchange=exchange, capacity=tokens)
            right.append(torch.equal(y, expected(rows, weights, 8, torch.bfloat16, WIDE)))
            sent.append(dict(ledger.sent[topology.rank]))
            ledger.sent[topology.rank].clear()
        nodes = torch.div(rows.topk_idx, 16, rounding_mode="floor")
        there = sum(len(set(row) - {topology.node}) for row in nodes.tolist())
        return right, sent, there, [set(row) for row in nodes.tolist()]

    found = thread_world(8, 8, action)
    forward, back = sent_bytes(WIDE, 1, 0), 2 * WIDE.hidden
    for rank, (right, (gather, exact), there, _) in enumerate(found):
        assert right == [True, True]
        assert gather == {"gather": 7 * tokens * forward, "swap": 7 * tokens * back}
        node, local = divmod(rank, 8)
        arrived = sum(node in wanted for other in range(8) if other != node for wanted in found[other * 8 + local][3])
        assert exact == {"swap": there * forward + arrived * back}
