"""How ranks are cut into nodes."""

import os
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes.rail import rail_options
from megamoe_jit._nodes.ranks import _ranks_per_node


@pytest.mark.parametrize(
    ("places", "size"), [("a", 1), ("aa", 2), ("ab", 1), ("aabb", 2), ("aaabbbccc", 3), ("abcd", 1)]
)
def test_ranks_of_one_place_are_a_node(places: str, size: int):
    assert _ranks_per_node(list(places)) == size


@pytest.mark.parametrize("places", ["aab", "abab", "aabbb", "abba", "aabbaa", "aabcc", "abb", "aabc"])
def test_nodes_of_different_sizes_and_other_orders_are_refused(places: str):
    with pytest.raises(ConfigError, match=r"ranks lie unevenly on nodes, or not node by node \(rank 0: a, .*torchrun"):
        _ranks_per_node(list(places))


def test_a_node_has_no_more_ranks_than_a_kernel():
    with pytest.raises(ConfigError, match="a node has 9 ranks; allowed: at most 8"):
        _ranks_per_node(["a"] * 9)


def test_what_travels_fits_beside_a_kernel(monkeypatch: pytest.MonkeyPatch):
    """NCCL takes so many blocks, and no clusters of them, for which free SMs would have to lie together."""

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace()

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    before = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    with rail_options(8, 30.0) as options:
        assert vars(options.config) == {"max_ctas": 8, "cga_cluster_size": 1}
        assert options._timeout.total_seconds() == 30.0
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == before


@pytest.mark.parametrize(("given", "taken"), [({}, 32), ({"chunks": 2}, 8), ({"chunks": 2, "comm_ctas": 5}, 5)])
def test_nccl_has_many_blocks_where_nothing_runs_beside_it(given: dict[str, int], taken: int):
    asked = []

    class Ranks(mm.NodeTopology):
        def rail(self, comm_ctas: int, timeout_s: float):
            asked.append(comm_ctas)
            raise ConfigError("enough")

    with pytest.raises(ConfigError, match="enough"):
        mm.get_multinode_buffer_for_mega_moe(Ranks(None), 8, 64, 2, 256, 128, device="cpu", **given)
    assert asked == [taken]
