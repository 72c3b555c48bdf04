"""What ranks agree on, between real processes on the CPU; and the parent that starts and watches them."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megamoe_jit._check.collect import collect, joined
from megamoe_jit._check.spawn import World, describe, own_gpu, run_ranks
from megamoe_jit._errors import CompileError, ConfigError, MegaMoeError, PeerTimeoutError, RankMismatchError
from megamoe_jit._layer import group as _ranks
from megamoe_jit._layer import symmetric as _symmetric
from tests.ranks import forked

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def _failure(action):
    try:
        return ["returned", action()]
    except Exception as error:
        return [type(error).__name__, str(error)]


def _stand_in_devices(rank, hosts, uuids, access=True):
    """Where the rank is, what it knows of the others' GPUs; each process sees one GPU, as index 0."""
    place = _symmetric.Place(hosts[rank], f"name{rank}", os.getpid(), "/tmp", (1, 2), uuids[rank], 0)
    _symmetric._here = lambda device: place
    _symmetric._reaches = lambda device, uuid: access


def _allocate(rank, fails=(), denied=False):
    """`allocate_symmetric` with a stand-in for torch's symmetric memory."""
    import torch.distributed._symmetric_memory as symm_mem

    def empty(size, dtype, device):
        if rank in fails:
            raise RuntimeError(f"CUDA out of memory on {rank}")
        return torch.empty(size, dtype=dtype)

    symm_mem.empty = empty

    def rendezvous(memory, group):
        dist.barrier(group)  # as torch's, it waits for all ranks
        if os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
            raise RuntimeError("detected allocations from overlapping devices\nmore")
        if denied:
            raise RuntimeError("CUDA driver error: peer access is not supported\nmore")
        return SimpleNamespace(buffer_ptrs=[1, 2], size=memory.numel())

    symm_mem.rendezvous = rendezvous
    memory, handle = _symmetric.allocate_symmetric(
        dist.group.WORLD, 64, torch.device("cpu"), lambda why: ConfigError(f"too large: {why}")
    )
    return [memory.numel(), handle.buffer_ptrs, handle.size]


def on_each_rank(world: World) -> dict[str, object]:
    """Everything that is looked at, in one spawn."""
    group, rank, last = dist.group.WORLD, world.rank, world.ranks - 1
    seen: dict[str, object] = {}

    def fail():
        if rank == last:
            raise CompileError(f"line {rank}")
        return rank

    def fail_everywhere():
        raise ConfigError(f"no {rank}")

    seen["place"] = [_ranks.group_rank(group), _ranks.group_size(group)]
    seen["gather"] = _ranks.gather(group, {"rank": rank})
    seen["equal"] = _failure(lambda: _ranks.require_equal(group, "it", {"a": 1, "b": "x"}))
    fields = {"size": 5 + (rank == last), "same": 1, "name": "n" if rank else "m"}
    seen["unequal"] = _failure(lambda: _ranks.require_equal(group, "the layer", fields))
    seen["second"] = _failure(lambda: _ranks.require_equal(group, "it", {"a": 1, "b": rank == 1}))
    seen["collectively"] = _failure(lambda: _ranks.collectively(group, "counting", lambda: rank * 10))
    seen["one fails"] = _failure(lambda: _ranks.collectively(group, "compiling", fail))
    seen["all fail"] = _failure(lambda: _ranks.collectively(group, "compiling", fail_everywhere))
    apart = [f"host{r}" for r in range(world.ranks)]
    _stand_in_devices(rank, apart, apart)
    seen["hosts"] = _failure(lambda: _allocate(rank))
    _stand_in_devices(rank, ["here"] * world.ranks, ["GPU-a"] * world.ranks)
    seen["shared GPU"] = _failure(lambda: _allocate(rank))
    _stand_in_devices(rank, ["here"] * world.ranks, apart)
    seen["no memory"] = _failure(lambda: _allocate(rank, fails=[last]))
    seen["allocated"] = _failure(lambda: _allocate(rank))
    seen["left behind"] = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES")
    seen["no rendezvous"] = _failure(lambda: _allocate(rank, denied=True))
    _stand_in_devices(rank, ["here"] * world.ranks, apart, access=None)
    seen["rendezvous of unknown GPUs"] = _failure(lambda: _allocate(rank, denied=True))
    _stand_in_devices(rank, ["here"] * world.ranks, apart, access=rank != last)
    seen["no access"] = _failure(lambda: _allocate(rank))
    with torch.device("meta"), torch.inference_mode():
        seen["other defaults"] = _ranks.gather(group, rank)
    seen["still together"] = _ranks.gather(group, rank)
    return seen


@pytest.fixture(scope="module")
def seen():
    """What each of three ranks saw: a first, a last, and one between them."""
    with forked():
        ends = run_ranks("tests.unit.layer.test_group:on_each_rank", 3, device="cpu", timeout_s=120, group_timeout_s=30)
    assert all(end.ok for end in ends), describe(ends)
    return [end.result for end in ends]


def test_gather_brings_every_value_to_every_rank(seen):
    ranks = len(seen)
    for rank, each in enumerate(seen):
        assert each["place"] == [rank, ranks]
        assert each["gather"] == [{"rank": r} for r in range(ranks)]
        assert each["still together"] == list(range(ranks))


def test_equal_fields_are_accepted(seen):
    assert all(each["equal"] == ["returned", None] for each in seen)


def test_unequal_fields_raise_on_every_rank_and_name_field_and_ranks(seen):
    last = len(seen) - 1
    for kind, text in (each["unequal"] for each in seen):
        assert kind == RankMismatchError.__name__
        assert text.startswith("ranks disagree on the layer: ")
        assert "size (rank 0: 5, " in text
        assert f"rank {last}: 6)" in text
        assert "name (rank 0: m, rank 1: n" in text
        assert "same" not in text


def test_a_rank_between_equal_ones_that_differs_is_seen(seen):
    """Neither the first nor the last."""
    values = ", ".join(f"rank {rank}: {rank == 1}" for rank in range(len(seen)))
    for each in seen:
        assert each["second"] == [RankMismatchError.__name__, f"ranks disagree on it: b ({values})"]


def test_a_failure_on_one_rank_raises_on_all(seen):
    last = len(seen) - 1
    for rank, each in enumerate(seen):
        assert each["collectively"] == ["returned", rank * 10]
        kind, text = each["one fails"]
        if rank == last:
            assert (kind, text) == ("CompileError", f"line {last}")
        else:
            assert (kind, text) == ("MegaMoeError", f"compiling failed on rank {last}: CompileError: line {last}")
        assert each["all fail"] == ["ConfigError", f"no {rank}"]


def test_symmetric_memory_needs_one_host_and_one_gpu_for_each_rank(seen):
    for each in seen:
        kind, text = each["hosts"]
        assert kind == "MegaMoeError"
        assert "different hosts (rank 0: name0 (boot id host0), rank 1: name1 (boot id host1)" in text
        kind, text = each["shared GPU"]
        assert kind == "MegaMoeError"
        assert "share a GPU (rank 0: GPU-a, rank 1: GPU-a" in text


def test_ranks_that_see_one_gpu_each_meet_and_leave_no_variable_behind(seen):
    for each in seen:
        assert each["allocated"] == ["returned", [64, [1, 2], 64]]
        assert each["left behind"] is None


def test_a_rendezvous_that_fails_is_an_error_of_ours_with_what_could_not_be_checked(seen):
    for rank, each in enumerate(seen):
        kind, text = each["no rendezvous"]
        assert kind == "MegaMoeError"
        assert text == "torch could not share the memory of cpu: CUDA driver error: peer access is not supported"
        kind, more = each["rendezvous of unknown GPUs"]
        others = [other for other in range(len(seen)) if other != rank]
        assert kind == "MegaMoeError"
        assert more.startswith(f"{text}; cpu may have no access to the GPUs of ranks {others}, which")


def test_a_rank_that_cannot_reach_the_others_is_named_on_all(seen):
    last = len(seen) - 1
    for rank, each in enumerate(seen):
        kind, text = each["no access"]
        assert kind == "MegaMoeError"
        assert f"cpu (host{last}) has no access to the memory of other ranks' GPUs (rank 0: host0" in text
        assert rank == last or text.startswith(f"checking the peers failed on rank {last}: ")


def test_the_programs_default_device_is_none_of_the_meetings(seen):
    assert all(each["other defaults"] == list(range(len(seen))) for each in seen)


def test_memory_that_one_rank_lacks_raises_on_all_with_the_bytes(seen):
    last = len(seen) - 1
    for rank, each in enumerate(seen):
        kind, text = each["no memory"]
        assert f"too large: CUDA out of memory on {last}" in text
        if rank == last:
            assert kind == "ConfigError"
        if rank != last:
            assert kind == "MegaMoeError"
            assert text.startswith(f"allocating 64 bytes of symmetric memory failed on rank {last}: ")


def test_one_rank_needs_no_process_group():
    assert (_ranks.group_rank(None), _ranks.group_size(None)) == (0, 1)
    assert _ranks.gather(None, "x") == ["x"]
    _ranks.require_equal(None, "it", {"a": 1})
    assert _ranks.collectively(None, "it", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        _ranks.collectively(None, "it", lambda: 1 / 0)


def test_a_rank_that_failed_says_so_even_if_the_others_never_come(monkeypatch):
    def absent(group, value):
        raise PeerTimeoutError("the ranks did not all meet")

    def fail():
        raise ConfigError("no memory")

    monkeypatch.setattr(_ranks, "gather", absent)
    monkeypatch.setattr(_ranks, "group_size", lambda group: 2)
    with pytest.raises(ConfigError, match="no memory") as caught:
        _ranks.collectively(object(), "it", fail)
    assert isinstance(caught.value.__cause__, PeerTimeoutError)
    with pytest.raises(PeerTimeoutError):
        _ranks.collectively(object(), "it", lambda: 1)


# -- the parent ---------------------------------------------------------------------------------------------------


def misbehave(world: World, how: str) -> str:
    """The last rank does not do what the others wait for."""
    world.report(f"rank {world.rank} of {world.ranks}")
    if how == "die":
        _failure(dist.barrier)  # whoever is gone before the other one has connected ends that one too
    if world.rank == world.ranks - 1:
        if how == "raise":
            raise ConfigError("not today")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "sleep":
            print("so tired", flush=True)  # noqa: T201 - what ranks print is part of the report
            time.sleep(600)
    if how in ("raise", "sleep"):
        time.sleep(600)
    return "fine"


@pytest.mark.parametrize(("visible", "gpus"), [(1, [0, 0, 0]), (4, [0, 1, 3])])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(monkeypatch, visible, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert [own_gpu(rank) for rank in (0, 1, 3)] == gpus


def test_a_rank_that_raises_ends_the_others_after_a_grace():
    begin, reports = time.monotonic(), []
    ends = run_ranks(
        "tests.unit.layer.test_group:misbehave",
        2,
        {"how": "raise"},
        device="cpu",
        timeout_s=100,
        grace_s=0.2,
        on_report=lambda rank, text: reports.append((rank, text)),
    )
    assert time.monotonic() - begin < 60
    assert sorted(reports) == [(0, "rank 0 of 2"), (1, "rank 1 of 2")]
    assert [end.messages for end in ends] == [["rank 0 of 2"], ["rank 1 of 2"]]
    assert [end.returncode for end in ends] == [None, 1]
    assert "ConfigError: not today" in ends[1].error
    story = describe(ends)
    assert "rank 0: did not end and was killed" in story
    assert "rank 1: ended with code 1\nTraceback" in story


def test_ranks_that_do_not_end_are_killed_and_what_they_printed_is_told():
    with forked():
        ends = run_ranks("tests.unit.layer.test_group:misbehave", 2, {"how": "sleep"}, device="cpu", timeout_s=10)
    assert [end.returncode for end in ends] == [None, None]
    assert "so tired" in describe(ends)


def test_a_lost_rank_may_leave_the_others_to_finish():
    options = {"device": "cpu", "timeout_s": 60, "losses": 1}
    with forked():
        ends = run_ranks("tests.unit.layer.test_group:misbehave", 2, {"how": "die"}, **options)
    assert (ends[0].result, ends[0].ok) == ("fine", True)
    assert (ends[1].returncode, ends[1].finished) == (-signal.SIGKILL, False)
    assert "rank 1: ended with code -9" in describe(ends)


def leave(world: World) -> list:
    """The last rank goes between two meetings."""
    if world.rank == world.ranks - 1:
        _ranks.gather(dist.group.WORLD, world.rank)
        time.sleep(0.2)
        os._exit(7)
    return _failure(lambda: [_ranks.gather(dist.group.WORLD, world.rank) for _ in range(2)])


def test_a_rank_that_is_gone_is_an_error_of_ours_at_the_next_meeting():
    """torch raises a plain RuntimeError, which callers who catch MegaMoeError would not see."""
    options = {"device": "cpu", "timeout_s": 60, "group_timeout_s": 30, "losses": 1}
    with forked():
        ends = run_ranks("tests.unit.layer.test_group:leave", 2, **options)
    assert (ends[0].ok, ends[1].returncode) == (True, 7), describe(ends)
    kind, text = ends[0].result
    assert kind == PeerTimeoutError.__name__
    assert text.startswith("rank 0: the ranks did not all meet on the host: ")
    assert "\n" not in text


def test_collect_returns_results_by_rank_and_raises_what_ranks_said(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MegaMoeError, match="not today"):
        collect("tests.unit.layer.test_group:misbehave", 1, {"how": "raise"}, device="cpu", timeout_s=60)
    with pytest.raises(ConfigError, match="ranks = 64 needs 64 GPUs"):
        collect("tests.unit.layer.test_group:misbehave", 64, {"how": "raise"})


def test_torchrun_is_recognised_and_must_have_started_as_many(monkeypatch):
    def started(rank: str) -> None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")

    monkeypatch.delenv("RANK", raising=False)
    assert joined() is None
    started("1")
    assert joined() == (1, 2)
    started("one")
    assert joined() is None
    started("0")
    with pytest.raises(ConfigError, match="ranks = 3, but torchrun started 2"):
        collect("tests.unit.layer.test_group:misbehave", 3, device="cpu")
