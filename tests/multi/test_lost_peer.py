"""A rank is killed before, during and between launches: the others say so in time, and end in good order."""

import pytest

from megamoe_jit._check.spawn import describe, run_ranks
from tests.multi import lost
from tests.multi.harness import warm
from tests.multi.worker import shape_for

DEADLINE_S = 3
#: The launch that fails, and what the lost rank can still owe the others in it.
EXPECTED = {
    "before": (1, ("inputs",)),
    "between": (1 + lost.GOOD_ROUNDS, ("inputs",)),
    "stalled": (1 + lost.GOOD_ROUNDS, ("inputs",)),
    "computing": (1 + lost.GOOD_ROUNDS, ("inputs", "results")),
}


@pytest.fixture(scope="module", autouse=True)
def kernels(ranks):
    warm([shape_for(ranks, *lost.SIZES)], ranks)


@pytest.mark.parametrize("victim", ["first", "last"])
@pytest.mark.parametrize("when", EXPECTED)
def test_the_others_name_a_lost_rank_and_end_in_good_order(when, victim, ranks):
    dead = 0 if victim == "first" else ranks - 1
    ends = run_ranks(
        "tests.multi.lost:run",
        ranks,
        {"when": when, "victim": dead},
        losses=1,
        timeout_s=120,
        group_timeout_s=40,
        environment={rank: {"MEGAMOE_JIT_TIMEOUT_S": str(DEADLINE_S)} for rank in range(ranks)},
    )
    story = describe(ends)
    launch, meetings = EXPECTED[when]
    assert ends[dead].returncode == -9, story
    for end in ends:
        if end.rank == dead:
            continue
        assert end.finished, story
        found = end.result
        assert found["error"] == "PeerTimeoutError", found
        assert found["text"].startswith(f"rank {end.rank}: "), found
        assert f"(missing: rank {dead})" in found["text"], found
        assert any(f"to have their {meeting} ready in launch {launch} " in found["text"] for meeting in meetings), found
        assert DEADLINE_S - 0.5 < found["seconds"] < DEADLINE_S + 3, found
        assert found["later"] == "PeerTimeoutError", found
        assert "unusable" in found["later_text"], found
        assert found["destroy_seconds"] < 1, found
        assert end.returncode == 0, story
