"""`NodeTopology`: the ranks of several nodes, and the buffers that layers of a model share on them."""

from __future__ import annotations

from typing import Any

import torch

from megamoe_jit._nodes.ranks import NodeRanks
from megamoe_jit._nodes.serving import NodesLease, lease_of
from megamoe_jit._spec import MoEShape

__all__ = ["NodeTopology"]


class NodeTopology(NodeRanks):
    """How the ranks of a process group lie on nodes; a collective of all of them.

    A node is what one kernel launch spans: GPUs of one host, each other's NVLink peers. A rail is the ranks with the
    same number on every node: rows travel between nodes along rails alone. Ranks are numbered node by node,
    ``rank = node * ranks_per_node + local_rank``, as torchrun numbers them.

    Args:
        group: the process group of all ranks that share the experts.
        node_group: that of this rank's node. By default ranks of one host are a node, which its boot id tells.
        rail_group: that of this rank's rail. By default made when a buffer needs it, with that buffer's deadline.
        ranks_per_node: where the group is to be cut instead, such as 1 for GPUs of a host that are no peers.

    Attributes:
        group, node_group: as given or made; `node_group` is None where a node is one rank.
        nodes, node: how many, and which one this is.
        ranks_per_node, local_rank: ranks of a node, and which one this is.
        world_size, rank: ranks of all nodes, and which one this is.
        one_host: whether all are on one, so that rows between nodes go over NVLink and not over a network.

    Raises:
        ConfigError: nodes have different numbers of ranks, or the ranks are in another order; on every rank.
        PeerTimeoutError: a rank did not come before the process group gave up.
    """

    def __init__(
        self, group: Any, node_group: Any = None, rail_group: Any = None, *, ranks_per_node: int | None = None
    ) -> None:
        super().__init__(group, node_group, rail_group, ranks_per_node=ranks_per_node)
        self._shared: dict[Any, Any] = {}

    def lease(self, shape: MoEShape, max_tokens: int, device: torch.device, workspace: object) -> NodesLease:
        """What a layer of a model takes of it: see `lease_of`."""
        return lease_of(self, self._shared, shape, max_tokens, device, workspace)
