"""Two GPUs as two nodes: NCCL between them over NVLink, and over sockets as between hosts; and a node that is lost."""

import pytest

from megamoe_jit._check.spawn import describe, run_ranks
from megamoe_jit._jit.runtime import warmup
from megamoe_jit._spec import FP8, KernelSpec, MoEShape, Variant
from megamoe_jit._spec.numerics import Numerics
from tests.multi import checks_nodes, lost_nodes
from tests.multi.harness import run_checks, warm
from tests.multi.worker import shape_for

RANKS = 2  #: more are more of the same, and take more GPUs
#: NCCL believes that ranks are on hosts of their own, and has nothing better there than the loopback interface.
SOCKETS = {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
OVER = {
    "nvlink": dict.fromkeys(range(RANKS), {}),
    "sockets": {rank: {**SOCKETS, "NCCL_HOSTID": f"host{rank}"} for rank in range(RANKS)},
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    shape = shape_for(RANKS, *checks_nodes.SIZES)
    node = MoEShape(shape.hidden, shape.intermediate, shape.experts // RANKS, shape.topk)
    wide = [Numerics(float32_out=wide) for wide in (False, True)]
    specs = [KernelSpec(node, v, 1, numerics=numerics) for v in Variant.reading(FP8) for numerics in wide]
    for result in warmup(specs):
        assert result.error is None, result.error
    warm([shape], RANKS)


@pytest.fixture(scope="module", params=OVER)
def outcome(request):
    return run_checks(
        "tests.multi.checks_nodes", list(checks_nodes.CHECKS), RANKS, environment=OVER[request.param], timeout_s=200
    )


@pytest.mark.parametrize("name", checks_nodes.CHECKS)
def test_two_nodes(outcome, name):
    assert outcome[name] == ""


@pytest.mark.parametrize("calls", ["gather", "exact", "replayed"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("over", OVER)
def test_the_other_names_a_node_that_is_lost(over, how, calls):
    ends = run_ranks(
        "tests.multi.lost_nodes:run",
        RANKS,
        {"how": how, "calls": calls},
        losses=1,
        timeout_s=90,
        group_timeout_s=40,
        environment=OVER[over],
    )
    story = describe(ends)
    assert ends[1].returncode == -9, story
    end = ends[0]
    found = next((said[1] for said in end.messages if said[0] == "found"), None)
    assert found is not None, story
    assert found["error"] == "PeerTimeoutError", found
    assert found["text"].startswith("node 0 (rank 0): in call "), found
    assert "(missing: node 1 (rank 1): its process is gone or stands still)" in found["text"], found
    assert found["seconds"] < lost_nodes.TIMEOUT_S + 10, found
    assert found["later"] == "PeerTimeoutError", found
    assert found["destroy_seconds"] < 1, found
    assert end.returncode == 0, story
