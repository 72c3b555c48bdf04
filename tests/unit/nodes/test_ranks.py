"""How ranks are cut into nodes."""

import pytest

from megamoe_jit._errors import ConfigError
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
