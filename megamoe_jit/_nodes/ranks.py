"""Which ranks are one node, which are one rail, and the process groups of both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.group import by_rank, collectively, gather, group_rank, group_size, require_equal
from megamoe_jit._layer.symmetric import host_id
from megamoe_jit._nodes.rail import TorchRail, rail_options
from megamoe_jit._nodes.roll_call import RollCall
from megamoe_jit._spec import MAX_RANKS
from megamoe_jit._spec.checks import check


class NodeRanks:
    """What a `NodeTopology` knows of its ranks, without what layers share; arguments and attributes are there."""

    def __init__(
        self, group: Any, node_group: Any = None, rail_group: Any = None, *, ranks_per_node: int | None = None
    ) -> None:
        self.group = group
        self.world_size, self.rank = group_size(group), group_rank(group)
        self._rails: dict[tuple[Any, ...], Any] = {}
        self._rail_group = rail_group
        given = None if node_group is None else _members(group, node_group)

        def admit() -> int:
            if ranks_per_node is not None:
                return _check_split(ranks_per_node, self.world_size, node_group)
            return 0

        split = collectively(group, "splitting the ranks into nodes", admit)
        here = tuple(given) if given is not None else f"{self.rank // split}" if split else host_id()
        places = gather(group, (here, os.environ.get("NCCL_HOSTID", "") or host_id()))
        self.ranks_per_node = size = _ranks_per_node([place for place, _ in places])
        self.one_host = len({host for _, host in places}) == 1  # as NCCL sees it
        self.nodes, self.node, self.local_rank = self.world_size // size, self.rank // size, self.rank % size
        if rail_group is not None:
            expected = self.rail_ranks(self.local_rank)
            members = _members(group, rail_group)
            collectively(group, "checking the rails", lambda: _check_members("rail_group", members, expected))
        if node_group is None and size > 1:
            nodes = [self.node_ranks(node) for node in range(self.nodes)]
            node_group = self._new_groups(nodes, "node") if self.nodes > 1 else group
        self.node_group = node_group if size > 1 else None
        self.roll_call = RollCall(group)

    def node_ranks(self, node: int) -> list[int]:
        """Ranks of a node, by local rank."""
        return list(range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node))

    def rail_ranks(self, local_rank: int) -> list[int]:
        """Ranks of a rail, by node."""
        return list(range(local_rank, self.world_size, self.ranks_per_node))

    def place_of(self, rank: int) -> str:
        """A rank as errors name it."""
        return f"node {rank // self.ranks_per_node} (rank {rank})"

    def rail(self, comm_ctas: int, timeout_s: float) -> TorchRail:
        """This rank's rail; a collective the first time for each pair of values.

        Args:
            comm_ctas: most blocks that a kernel of NCCL takes.
            timeout_s: after which the rail gives up, seconds.
        """
        key = (comm_ctas, timeout_s)
        if key not in self._rails:
            group = self._rail_group
            if group is None and self.nodes > 1:
                gather(self.group, None)  # so that nobody's deadline begins before the others are here
                with rail_options(comm_ctas, timeout_s) as options:
                    rails = [self.rail_ranks(local) for local in range(self.ranks_per_node)]
                    group = self._new_groups(rails, "rail", timeout=timedelta(seconds=timeout_s), pg_options=options)
            self._rails[key] = TorchRail(group, self.nodes, self.node, timeout_s, self.roll_call.missing)
        return self._rails[key]  # type: ignore[no-any-return]

    def _new_groups(self, parts: Sequence[Sequence[int]], what: str, **options: Any) -> Any:
        """Process groups of parts that have every rank once, with options of torch's `new_group`; that of this rank's.

        torch wants every process of the program to make each group, or else finds one by how many groups a process has.
        """
        import torch.distributed as dist

        of_all = self.world_size == dist.get_world_size()
        if not of_all:
            known = {"groups": len(getattr(dist.distributed_c10d._world, "pg_names", ()))}
            require_equal(self.group, f"the process groups they have made (or pass {what}_group)", known)
        options |= {"use_local_synchronization": not of_all, "group_desc": what}
        mine = None
        for ranks in parts:
            if of_all or self.rank in ranks:
                made = dist.new_group([dist.get_global_rank(self.group, rank) for rank in ranks], **options)
                mine = made if self.rank in ranks else mine
        return mine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.nodes} nodes of {self.ranks_per_node} ranks, this is rank {self.rank})"


def _check_split(ranks_per_node: object, ranks: int, node_group: object) -> int:
    fits = type(ranks_per_node) is int and ranks_per_node > 0 and ranks % ranks_per_node == 0
    allowed = f"a divisor of {ranks}, the ranks of the group, without node_group"
    check(fits and node_group is None, "ranks_per_node", ranks_per_node, allowed)
    assert isinstance(ranks_per_node, int)
    return ranks_per_node


def _ranks_per_node(places: Sequence[object]) -> int:
    """The size of nodes, if ranks of one place follow each other and all have as many; the same error on every rank."""
    size = 1
    while size < len(places) and places[size] == places[0]:
        size += 1
    starts = places[::size]
    good = len(places) % size == 0 and len(set(starts)) == len(starts)
    if not good or any(places[i] != places[i - i % size] for i in range(len(places))):
        raise ConfigError(
            f"ranks lie unevenly on nodes, or not node by node ({by_rank(places)}); "
            "allowed: as many on each node, numbered node by node, as torchrun does"
        )
    if size > MAX_RANKS:
        raise ConfigError(
            f"a node has {size} ranks; allowed: at most {MAX_RANKS} (ranks_per_node or node_group cut it in parts)"
        )
    return size


def _members(group: Any, part: Any) -> list[int]:
    """Ranks in `group` of the members of another group."""
    import torch.distributed as dist

    group_size(part)  # raises if it is no group
    return [dist.get_group_rank(group, rank) for rank in dist.get_process_group_ranks(part)]


def _check_members(what: str, members: Sequence[int], expected: Sequence[int]) -> None:
    if list(members) != list(expected):
        raise ConfigError(f"{what} has ranks {list(members)}; allowed: {list(expected)}, one of each node")
