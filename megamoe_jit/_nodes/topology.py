"""`NodeTopology`: the ranks of several nodes, and the buffers that layers of a model share on them.

A `MegaMoE` whose experts are on several nodes has a lease of a buffer, and calls it.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._nodes.buffer import MultiNodeBuffer
from megamoe_jit._nodes.calls import fp8_mega_moe_multinode, get_multinode_buffer_for_mega_moe
from megamoe_jit._nodes.ranks import NodeRanks
from megamoe_jit._spec import MoEShape, check_int
from megamoe_jit._text import shown


class NodesLease:
    """One layer's use of a `MultiNodeBuffer`, as `workspace.Lease` is that of a `SymmBuffer`.

    Args:
        buffer: that is used.
        kind: "shared", "own" or "given".
        shape: the layer's, with the experts of this rank.
        users: all leases of the buffer.
    """

    name = "nodes"  #: no operator finds it by that

    def __init__(self, buffer: MultiNodeBuffer, kind: str, shape: MoEShape, users: weakref.WeakSet[NodesLease]) -> None:
        self._buffer: MultiNodeBuffer | None = buffer
        self.kind, self.shape, self.capacity = kind, shape, buffer.num_max_tokens_per_rank
        self._users = users
        users.add(self)

    @property
    def buffer(self) -> MultiNodeBuffer:
        """The buffer; raises `ConfigError` once this lease was released."""
        if self._buffer is None:
            raise ConfigError("this layer was destroyed; allowed: calls before destroy()")
        return self._buffer

    def again(self) -> NodesLease:
        """A lease for a copy of the layer, of the same buffer."""
        self.buffer.require_usable()
        return NodesLease(self.buffer, self.kind, self.shape, self._users)

    def release(self) -> None:
        """Give the buffer up, and its memory back with the last lease; that is a collective. Safe to call twice.

        Raises:
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing was given back.
        """
        if self._buffer is not None and self.kind != "given" and len(self._users) == 1:
            self._buffer.destroy()
        self._buffer = None
        self._users.discard(self)

    def serve(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        l1: WeightTensors,
        l2: WeightTensors,
        clamp: float | None,
        fast_math: bool,
        padded_tokens: int | None,
    ) -> torch.Tensor:
        """A batch, staged and run; as many rows on every rank.

        Returns:
            bf16 ``[T, hidden]``.

        Raises:
            MegaMoeError: as `fp8_mega_moe_multinode`.
        """
        buffer = self.buffer
        with buffer.lock:
            try:
                tokens = buffer.stage(x, topk_idx, topk_weights)
            except ConfigError as error:
                buffer.refuse(error, fast_math, l1)
            y = torch.empty(tokens, buffer.hidden, dtype=torch.bfloat16, device=buffer.device)
            fp8_mega_moe_multinode(y, l1, l2, buffer, padded_tokens, clamp, fast_math)
        return y


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
        self._shared: dict[Any, Any] = {}  #: buffers with their leases, by shape, capacity and device

    def lease(self, shape: MoEShape, max_tokens: int, device: torch.device, workspace: object) -> NodesLease:
        """A lease of the buffer that a layer wants, which is made unless it is there; a collective.

        Args:
            shape: the layer's, with the experts of this rank.
            max_tokens: of a call.
            device: where the weights are.
            workspace: "shared", "own", or a `MultiNodeBuffer`.

        Raises:
            ConfigError: the buffer that was given does not fit, or the workspace is none of these.
            MegaMoeError: as `get_multinode_buffer_for_mega_moe`; or the buffer is not usable any more.
        """
        check_int("max_tokens", max_tokens)
        whole = replace(shape, experts=shape.experts * self.world_size)
        if isinstance(workspace, MultiNodeBuffer):
            workspace.require_usable()
            fits = workspace.shape == whole and workspace.topology is self and workspace.device == device
            if not fits or max_tokens > workspace.num_max_tokens_per_rank:
                given = f"a buffer for {workspace.num_max_tokens_per_rank} tokens of {workspace.shape}"
                wanted = f"{shown(max_tokens)} tokens or more of {whole}"
                raise ConfigError(f"workspace: {given}; allowed: {wanted}, of this topology")
            return NodesLease(workspace, "given", shape, weakref.WeakSet())
        if not isinstance(workspace, str) or workspace not in ("shared", "own"):
            allowed = "'shared', 'own', or a MultiNodeBuffer"
            raise ConfigError(f"workspace = {shown(workspace)} is not supported with a topology; allowed: {allowed}")
        key = (whole, max_tokens, device)
        buffer, users = self._shared.get(key, (None, weakref.WeakSet()))
        if workspace == "own" or buffer is None or not users:
            sizes = (whole.experts, max_tokens, whole.topk, whole.hidden, whole.intermediate, whole.shared)
            buffer, users = get_multinode_buffer_for_mega_moe(self, *sizes, device=device), weakref.WeakSet()
            if workspace == "shared":
                self._shared[key] = buffer, users
        return NodesLease(buffer, workspace, shape, users)
