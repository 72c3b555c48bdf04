"""Real processes over gloo: 2 x 2, 4 x 1 and 1 x 4 nodes out of the same four ranks, many cases in each."""

from __future__ import annotations

import os
import time
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megamoe_jit._check.spawn import World, describe, run_ranks
from megamoe_jit._errors import MegaMoeError
from megamoe_jit._nodes import buffer as _buffer
from megamoe_jit._nodes import calls as _calls
from megamoe_jit._nodes.calls import fp8_mega_moe_multinode
from megamoe_jit._nodes.roll_call import BEAT_S
from megamoe_jit._nodes.topology import NodesLease, NodeTopology
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MXFP4
from tests.ranks import forked
from tests.unit.nodes.losing import MORE_S, TIMEOUT_S, in_turn
from tests.unit.nodes.world import ROUTES, SHAPE, batch, buffer_of, expected, of_node, on_cpu, stage, whole_weights

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
TOKENS = (0, 1, 5, 8)
WAYS = (("gather", "bf16", 1), ("exact", "bf16", 3), ("exact", "fp32", 1), ("gather", "fp32", 2))
TWO_WAYS = (("gather", "bf16", 1), ("exact", "fp32", 3))


def said(action) -> str:
    """What an action raises."""
    try:
        return f"returned {action()}"
    except MegaMoeError as error:
        return f"{type(error).__name__}: {error}"


def layer(topology: NodeTopology, weights, ways=WAYS) -> list[str]:
    """Which cases are wrong on these nodes."""
    wrong = []
    for exchange, partial, chunks in ways:
        with buffer_of(topology, exchange=exchange, partial=partial, chunks=chunks) as buffer:
            l1, l2 = of_node(weights, buffer.first_expert, buffer.local_experts)
            for number, route in enumerate(ROUTES):
                rows = batch(TOKENS[(topology.rank + number) % 4], route, seed=topology.rank, nodes=topology.nodes)
                stage(buffer, rows)
                y = torch.full((len(rows), SHAPE.hidden), float("nan"), dtype=torch.bfloat16)
                fp8_mega_moe_multinode(y, l1, l2, buffer)
                dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[partial]
                if not torch.equal(y, expected(rows, weights, topology.nodes, dtype)):
                    wrong.append(f"{exchange} {partial} {chunks} {route}")
            buffer.check()
    return wrong


#: What is wrong with one argument of a call, and what is said of it.
MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "flat": ({"y": torch.empty(2, dtype=torch.bfloat16)}, "y has shape (2,)"),
    "narrow": ({"y": torch.empty(2, 128, dtype=torch.bfloat16)}, "y has shape (2, 128)"),
    "no weights": ({"l1": None}, "l1"),
    "flag": ({"fast_math": 1}, "fast_math = 1 is not supported"),
    "blocks": ({"num_sms": 0}, "num_sms = 0"),
    "clamp": ({"activation_clamp": -1.0}, "activation_clamp = -1.0"),
    "too many rows": ({"padded_tokens": 9999}, "padded_tokens = 9999"),
    "word": ({"fast_math": "no"}, "fast_math = 'no' is not supported"),
    "list": ({"fast_math": []}, "fast_math = [] is not supported"),
}


def alone(*_: object) -> None:
    """In the place of a collective that others do not come to."""
    raise MegaMoeError("a collective")


def refusals(topology: NodeTopology, rank: int) -> dict[str, str]:
    """What one rank alone does wrong before anything is sent."""
    seen = {
        "sizes": said(lambda: buffer_of(topology, capacity=8 + (rank == 3))),
        "exchange": said(lambda: buffer_of(topology, exchange="gather" if rank else "smoke")),
        "chunks": said(lambda: buffer_of(topology, chunks=0 if rank == 2 else 1)),
    }
    with buffer_of(topology) as buffer:
        weights = whole_weights()
        l1, l2 = of_node(weights, buffer.first_expert, buffer.local_experts)
        y = torch.empty(2, SHAPE.hidden, dtype=torch.bfloat16)
        stage(buffer, batch(2, "spread", seed=rank))
        lease = NodesLease(buffer, "given", SHAPE, weakref.WeakSet())
        x, ids = torch.zeros(2, SHAPE.hidden - (rank == 3)), torch.full((2, SHAPE.topk), -1)

        def serve() -> torch.Tensor:
            return lease.serve(x, ids, torch.zeros(2, SHAPE.topk), l1, l2, None, True, 4)

        with mock.patch.object(_buffer, "launch_stage"):
            seen["inputs"] = said(serve)
        for number, (name, (wrong, _)) in enumerate(MISTAKES.items()):
            given = {"y": y, "l1": l1, "l2": l2, "padded_tokens": 4, **(wrong if rank == number % 4 else {})}
            seen[name] = said(lambda given=given: fp8_mega_moe_multinode(buffer=buffer, **given))
        with override(debug=True):  # ranks that mean different calls would wait for ever otherwise
            fp8_mega_moe_multinode(y, l1, l2, buffer, 4)
            seen["rows"] = said(lambda: fp8_mega_moe_multinode(y, l1, l2, buffer, 4 + (rank == 1)))
        with mock.patch.object(_buffer, "collectively", alone):  # nobody comes to refuse together any more
            seen["later inputs"] = said(serve) if rank == 3 else ""
            for name, (wrong, _) in MISTAKES.items():
                given = {"y": y, "l1": l1, "l2": l2, "padded_tokens": 4, **wrong}
                seen[f"later {name}"] = said(lambda given=given: fp8_mega_moe_multinode(buffer=buffer, **given))
        seen["too many"] = said(lambda: fp8_mega_moe_multinode(y, l1, l2, buffer, 1))
    seen["destroyed"] = said(lambda: fp8_mega_moe_multinode(y, l1, l2, buffer))
    return seen


def on_each_rank(world: World) -> dict[str, object]:
    """Everything that is looked at, in one spawn; ranks are lost last."""
    world.report(while_all_are_there(world))
    with on_cpu():
        return in_turn(world)


def while_all_are_there(world: World) -> dict[str, object]:
    group, weights, seen = dist.group.WORLD, whole_weights(), {}
    _calls.place_of = torch.device
    with on_cpu():
        for split in (2, 1, 4):
            topology = NodeTopology(group, ranks_per_node=split)
            seen[f"{4 // split} x {split}"] = layer(topology, weights, WAYS if split < 4 else TWO_WAYS)
            seen[f"places of {split}"] = [topology.node, topology.local_rank, topology.place_of(world.rank)]
        two = NodeTopology(group, ranks_per_node=2)
        seen["2 x 2, mxfp4"] = layer(two, whole_weights(weights=MXFP4), TWO_WAYS)
        seen["refusals"] = refusals(two, world.rank)
        again = NodeTopology(group, two.node_group, two.rail(8, 60.0).group)
        seen["given groups"] = [again.nodes, again.ranks_per_node, layer(again, weights, TWO_WAYS)]
        one = NodeTopology(group)
        seen["one host"] = one.nodes, one.one_host, two.one_host
        with mock.patch.dict(os.environ, {"NCCL_HOSTID": f"host{world.rank // 2}"}):
            seen["two hosts"] = NodeTopology(group, ranks_per_node=2).one_host
        seen["odd split"] = said(lambda: NodeTopology(group, ranks_per_node=3))
        seen["wrong rail"] = said(lambda: NodeTopology(group, two.node_group, two.node_group))
        roll = two.roll_call
        roll.calls = 7 if world.rank else 9
        dist.barrier()
        seen["missing"] = roll.missing()
        dist.barrier()
        if world.rank == 3:
            roll.give_notice()
        if world.rank >= 2:
            roll._over.set()  # as if the process had ended, of one that has found a loss and of one that has not
        dist.barrier()
        time.sleep(BEAT_S)
        seen["missing then"] = roll.missing()
        dist.barrier()
    return seen


@pytest.fixture(scope="module")
def ends():
    """What became of four ranks, the third of which was killed in the end."""
    more = {"timeout_s": 150, "group_timeout_s": 60, "grace_s": 60, "losses": 1}
    with forked():
        return run_ranks("tests.unit.nodes.test_gloo:on_each_rank", 4, device="cpu", **more)


@pytest.fixture(scope="module")
def seen(ends):
    """What each rank saw while all were there."""
    assert all(end.messages for end in ends), describe(ends)
    return [end.messages[0] for end in ends]


@pytest.fixture(scope="module")
def lost(ends):
    """What each rank saw of one that was lost, but for the one that was killed."""
    assert [end.ok for end in ends] == [True, True, False, True], describe(ends)
    return {rank: end.result for rank, end in enumerate(ends) if end.ok}


@pytest.mark.parametrize("nodes", ["2 x 2", "4 x 1", "1 x 4", "2 x 2, mxfp4"])
def test_every_route_in_every_way_has_the_right_bits(seen, nodes: str):
    assert [each[nodes] for each in seen] == [[]] * 4


def test_ranks_know_their_places(seen):
    assert [each["places of 2"] for each in seen] == [
        [0, 0, "node 0 (rank 0)"],
        [0, 1, "node 0 (rank 1)"],
        [1, 0, "node 1 (rank 2)"],
        [1, 1, "node 1 (rank 3)"],
    ]
    assert [each["given groups"] for each in seen] == [[2, 2, []]] * 4
    assert [each["one host"] for each in seen] == [[1, True, True]] * 4
    assert [each["two hosts"] for each in seen] == [False] * 4


def test_what_one_rank_does_wrong_is_refused_on_all(seen):
    for rank, each in enumerate(seen):
        it = each["refusals"]
        assert it["sizes"].startswith("RankMismatchError: ranks disagree on the layer: tokens (rank 0: 8, rank 1: 8")
        failed = "rank 0" if rank else "exchange = 'smoke' is not supported; allowed: auto, gather, exact"
        assert failed in it["exchange"]
        assert ("chunks = 0 is not supported" if rank == 2 else "rank 2") in it["chunks"]
        assert it["rows"].startswith("RankMismatchError: ranks disagree on the rows of a call: padded_tokens")
        for number, (name, (_, says)) in enumerate(MISTAKES.items()):
            own = it[f"later {name}"]
            assert own.startswith("ConfigError: "), own
            assert says in own
            said_first = f"MegaMoeError: checking the arguments of the first call failed on rank {number % 4}: {own}"
            assert it[name] == (own if rank == number % 4 else said_first)
        own = f"ConfigError: x has shape (2, {SHAPE.hidden - 1}); allowed: (2, {SHAPE.hidden})"
        said_first = f"MegaMoeError: checking the arguments of the first call failed on rank 3: {own}"
        assert (it["inputs"], it["later inputs"]) == ((own, own) if rank == 3 else (said_first, ""))
        assert it["too many"] == "ConfigError: tokens = 2 is not supported; allowed: 0 to 1"
        assert it["destroyed"] == "ConfigError: this buffer was destroyed; allowed: calls before destroy()"
        assert "allowed: a divisor of 4" in each["odd split"]
        assert "wrong rail" in each
        assert "rail_group has ranks" in each["wrong rail"] or "checking the rails failed" in each["wrong rail"]


def test_who_has_given_notice_is_not_missed(seen):
    gone = {"2": "its process is gone or stands still"}
    assert [each["missing then"] for each in seen[:2]] == [{"1": "it has made 7 calls of 9", **gone}, gone]


def test_the_roll_call_tells_who_is_behind(seen):
    assert seen[0]["missing"] == {str(rank): "it has made 7 calls of 9" for rank in (1, 2, 3)}
    assert [each["missing"] for each in seen[1:]] == [{}] * 3


@pytest.mark.parametrize(("what", "who"), [("stopped", 3), ("killed", 2)])
def test_every_other_rank_says_in_time_which_node_and_rank_is_lost(lost, what: str, who: int):
    for rank, each in lost.items():
        if rank == who:
            continue
        it = each[what]
        assert it["said"].startswith(f"node {rank} (rank {rank}): in call 2 between nodes, rows did not get through: ")
        assert f"(missing: node {who} (rank {who}): its process is gone or stands still)" in it["said"]
        assert it["seconds"] < TIMEOUT_S + MORE_S
        assert it["again"] == it["said"], "the buffer stays as it is"
        assert it["destroyed in"] < 1.0, "nobody is waited for"


def test_one_that_goes_on_finds_its_call_lost_as_well(lost):
    assert "in call 2 between nodes, rows did not get through" in lost[3]["stopped"]["said"]
