"""A batch through the experts of one rank, where the engine itself brings tokens and results from rank to rank."""

from __future__ import annotations

import torch

from megamoe_jit._layer import from_bf16, serving
from megamoe_jit._layer.workspace import Lease, lease
from megamoe_jit._spec import MoEShape
from megamoe_jit.engines.held import HeldExperts

__all__ = ["CAPACITY", "LocalExperts"]

CAPACITY = 8192  #: tokens of a launch; larger batches are served in chunks, with the same bits


class LocalExperts:
    """The experts of one layer that are on this rank, and the buffer that its layers share.

    Args:
        held: the experts.
        topk: slots of a token.
        capacity: tokens of a launch.

    Raises:
        ConfigError: there is no kernel of these sizes, or no memory.
        UnsupportedDeviceError: there is no Hopper GPU.
    """

    def __init__(self, held: HeldExperts, topk: int, capacity: int = CAPACITY) -> None:
        self.held, self.topk = held, topk
        shape = MoEShape(held.hidden, held.intermediate, held.experts, topk)
        self._lease: Lease = lease(shape, capacity, held.l1[0].device)
        self._lease.buffer.prepare_all()  # none is compiled in a capture

    def __call__(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        clamp: float | None = None,
        factor: float = 1.0,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of a token's experts on this rank.

        Args:
            x: bf16, float16 or float32 ``[T, hidden]``.
            topk_idx: int32 or int64 ``[T, topk]``, numbers on this rank; -1 for experts of others.
            topk_weights: ``[T, topk]``.
            clamp: of SwiGLU, 0 or more.
            factor: router weights are multiplied with it.
            y: bf16 ``[T, hidden]`` to write.

        Returns:
            `y`, or a new tensor.

        Raises:
            MegaMoeError: as `mega_moe_from_bf16`.
        """
        buffer, (l1, l2) = self._lease.buffer, (self.held.l1, self.held.l2)
        if x.shape[0] > self._lease.capacity:
            weights = topk_weights if factor == 1.0 else topk_weights * factor
            return serving.serve(buffer, x, topk_idx, weights, l1, l2, clamp, True, y=y)
        return from_bf16.mega_moe_from_bf16(
            x, topk_idx, topk_weights, l1, l2, buffer, y=y, routed_scaling_factor=factor, activation_clamp=clamp
        )
