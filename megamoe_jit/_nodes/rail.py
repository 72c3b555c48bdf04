"""A rail: the ranks with one number on every node, and the few collectives that rows travel by.

`TorchRail` does them by torch.distributed, whatever its backend: NCCL between GPUs, gloo on a CPU. What travels is
bytes, so that no backend has to know a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from megamoe_jit._layer.symmetric import variable_set
from megamoe_jit._nodes.watch import Watch, wait_until

_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class TorchRail:
    """The ranks of a rail; every one of them calls the same, in the same order.

    Args:
        group: the process group of the rail, None where there is one node.
        nodes, node: its ranks, and which one this is.
        timeout_s: after which it gives up.
        missing: `RollCall.missing` of the ranks, asked when the host has waited so long.

    Attributes:
        captured: a CUDA graph has collectives of it.
    """

    def __init__(
        self,
        group: Any,
        nodes: int,
        node: int,
        timeout_s: float,
        missing: Callable[[], dict[int, str] | None] = lambda: None,
    ) -> None:
        self.group, self.nodes, self.node, self.timeout_s = group, nodes, node, timeout_s
        self.captured = False
        self._missing = missing
        self._landing: list[tuple[torch.Tensor, torch.cuda.Event]] = []  # free ones
        if group is not None:
            from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions

            self._gathering, self._swapping = AllgatherOptions(), AllToAllOptions()
            # on the current stream: one of NCCL's own costs host and device a meeting
            self._gathering.asyncOp = self._swapping.asyncOp = False

    def gather(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Each of `inputs`, ``[rows, ...]``, of every node into its place of `outputs`, ``[nodes * rows, ...]``."""
        to, of = [_bytes(tensor) for tensor in outputs], [_bytes(tensor) for tensor in inputs]
        _done(self.group.allgather_into_tensor_coalesced(to, of, self._gathering))

    def swap(
        self,
        output: torch.Tensor,
        given: torch.Tensor,
        arriving: Sequence[int] | None = None,
        leaving: Sequence[int] | None = None,
    ) -> None:
        """Rows of `given`, so many for each node (evenly without `leaving`), to the nodes; theirs into `output`."""
        come, go = ([] if rows is None else list(rows) for rows in (arriving, leaving))
        _done(self.group.alltoall_base(_bytes(output), _bytes(given), come, go, self._swapping))

    def counts(self, mine: torch.Tensor) -> Callable[[], list[list[int]]]:
        """Have int64 ``[nodes]`` of every node come to the host, and give what waits until they are there.

        What node a says of node b is then at ``[a][b]``. What is enqueued before that wait is none of it.
        """
        everyone = torch.empty(self.nodes * self.nodes, dtype=mine.dtype, device=mine.device)
        _done(self.group._allgather_base(everyone, mine, self._gathering))
        return self._to_host(everyone.view(self.nodes, self.nodes))

    def _to_host(self, tensor: torch.Tensor) -> Callable[[], list[list[int]]]:
        """What waits for its numbers, while ranks are there: a wait of CUDA's own has no end if one is lost."""
        if tensor.device.type != "cuda":
            return tensor.tolist
        there, copied = self._landing.pop() if self._landing else _landing(tensor)
        there.copy_(tensor, non_blocking=True)
        copied.record(torch.cuda.current_stream(tensor.device))  # whichever device is the current one

        def wait() -> list[list[int]]:
            wait_until(copied.query, Watch(self._missing, lambda: self.error(tensor.device), self.timeout_s))
            found: list[list[int]] = there.tolist()
            self._landing.append((there, copied))
            return found

        return wait

    def error(self, device: torch.device) -> str | None:
        """What NCCL has noticed itself, such as a connection that is gone; None while it has nothing to say."""
        if self.group is None or device.type != "cuda":
            return None
        get_error = getattr(self.group._get_backend(device), "get_error", None)
        found = None if get_error is None else get_error()
        return None if found is None or "SUCCESS" in str(found) else str(found).rpartition(".")[2].lower()

    def abort(self, device: torch.device) -> None:
        """End what is under way, here alone; nothing can be sent after it.

        Not where a graph has collectives of this rail: NCCL would wait until nobody has the graph any more, and torch
        with it. Then the end of the process ends what is under way.
        """
        if self.group is not None and device.type == "cuda" and not self.captured:
            abort = getattr(self.group._get_backend(device), "abort", None)
            if abort is not None:
                abort()


def _done(work: Any) -> None:
    """Wait for a collective where its backend has not, or needs not since it is in the stream's order."""
    if work is not None:
        work.wait()


def _landing(like: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Memory of the host that a GPU copies to, and what tells when it has."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True), event


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as uint8, rows as they are."""
    return tensor.view(torch.uint8)


@contextmanager
def rail_options(comm_ctas: int, timeout_s: float) -> Iterator[Any]:
    """Options of a process group for a rail: NCCL with few blocks that fit anywhere, whose errors are ours to raise.

    By default a thread of torch's ends the process when NCCL fails. Here `check()` is to say which node is lost, so
    that thread is told to leave it alone; torch reads how from the environment when a group is made.
    """
    import torch.distributed as dist

    if not (dist.is_nccl_available() and "nccl" in str(dist.get_backend_config())):
        yield None
        return
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = comm_ctas
    # by default NCCL's blocks come as clusters of four, for which SMs that a kernel has left free seldom lie together:
    # what travels would then wait for the end of every kernel that it is to travel beside
    options.config.cga_cluster_size = 1
    options._timeout = timedelta(seconds=timeout_s)
    with variable_set(_HANDLING, "0"):
        yield options
