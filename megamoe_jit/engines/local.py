"""A batch through the experts of one rank, where the engine itself brings tokens and results from rank to rank."""

from __future__ import annotations

import torch

from megamoe_jit._layer import from_bf16, serving
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.workspace import Lease, lease
from megamoe_jit._spec import FP8, MoEShape, WeightFormat
from megamoe_jit.engines.apart import made_apart
from megamoe_jit.engines.ready import make_ready

CAPACITY = 8192  #: tokens of a launch; larger batches are served in chunks, with the same bits


class LocalExperts:
    """Runs the experts of a layer that are on this rank, in the buffer that layers of its sizes share.

    Args:
        shape: of the experts on this rank; its `topk` is the slots of a token.
        device: where they are.
        capacity: tokens of a launch.
        weights: the format of the weights of calls to come.

    Attributes:
        shape: as given.

    Raises:
        ConfigError: there is no memory.
        UnsupportedDeviceError: there is no Hopper GPU.
        CaptureError: the current stream is capturing.
    """

    def __init__(
        self, shape: MoEShape, device: torch.device, capacity: int = CAPACITY, weights: WeightFormat = FP8
    ) -> None:
        self.shape = shape

        def make() -> Lease:
            made = lease(shape, capacity, device)
            make_ready(made.buffer, weights, capacity)
            return made

        self._lease = made_apart(make)

    def __call__(
        self,
        l1: WeightTensors,
        l2: WeightTensors,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        clamp: float | None = None,
        factor: float = 1.0,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts on this rank.

        Args:
            l1, l2: codes in the kernel's order, and what belongs to them.
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
        buffer = self._lease.buffer
        if x.shape[0] > self._lease.capacity:
            weights = topk_weights if factor == 1.0 else topk_weights * factor
            return serving.serve(buffer, x, topk_idx, weights, l1, l2, clamp, True, y=y)
        return from_bf16.mega_moe_from_bf16(
            x, topk_idx, topk_weights, l1, l2, buffer, y=y, routed_scaling_factor=factor, activation_clamp=clamp
        )
