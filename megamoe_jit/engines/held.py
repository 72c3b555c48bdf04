"""`HeldExperts`: one layer's experts where an engine keeps them, brought into the kernel's order and back in place.

Nothing is copied: addresses stay, so captured graphs read new weights, and what an engine moves expert by expert (EPLB)
stays in the order it is in.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.weights import (
    WeightPair,
    check_pairs,
    inverse_transform_weights_for_mega_moe_sm90,
    is_transformed,
    transform_weights_for_mega_moe_sm90,
)
from megamoe_jit._spec import MoEShape

__all__ = ["HeldExperts"]


class HeldExperts:
    """FP8 experts of one layer, in an engine's parameters.

    Args:
        w13: e4m3 ``[experts, 2 * intermediate, hidden]``, gate rows first, contiguous.
        w13_scales: float32 ``[experts, 2 * intermediate / 128, hidden / 128]``, contiguous.
        w2: e4m3 ``[experts, hidden, intermediate]``, and `w2_scales` likewise.

    Attributes:
        l1, l2: pairs of codes and scales, the engine's memory itself.
        experts, hidden, intermediate: their sizes.

    Raises:
        ConfigError: a dtype, a size or a place in memory is none that a kernel reads; nothing was written.
    """

    def __init__(self, w13: torch.Tensor, w13_scales: torch.Tensor, w2: torch.Tensor, w2_scales: torch.Tensor) -> None:
        self.l1: WeightPair = (w13.detach(), w13_scales.detach())
        self.l2: WeightPair = (w2.detach(), w2_scales.detach())
        check_pairs(self.l1, self.l2)
        if w13.ndim != 3:
            raise ConfigError(f"w13 has shape {tuple(w13.shape)}; allowed: [experts, 2 * intermediate, hidden]")
        self.experts, rows, self.hidden = w13.shape
        self.intermediate = rows // 2
        MoEShape(self.hidden, self.intermediate, self.experts, 1)  # raises where there is no kernel of these sizes
        for name, (codes, scales) in (("w13", self.l1), ("w2", self.l2)):
            check_tensor(f"{name} codes", codes, codes.dtype, codes.shape, w13.device)
            check_tensor(f"{name} scales", scales, torch.float32, scales.shape, w13.device, align=4)
        self._lock = threading.RLock()
        self._plain = False  #: known to be so: engines ask before each of thousands of writes

    def keeps(self, *tensors: torch.Tensor) -> bool:
        """Whether these are still the memory of w13, its scales, w2 and its scales."""
        mine = (*self.l1, *self.l2)
        return all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(mine, tensors, strict=True))

    @property
    def ready(self) -> bool:
        """Whether they are in the kernel's order."""
        return is_transformed(self.l1, self.l2)

    def to_kernel(self) -> None:
        """Bring them into the kernel's order, unless they are."""
        with self._lock:
            self._plain = False
            self._turn(transform_weights_for_mega_moe_sm90, wanted=True)

    def to_plain(self) -> None:
        """Bring them back into the engine's order, unless they are: before it writes others over them."""
        with self._lock:  # engines load experts by several threads
            if not self._plain:
                self._turn(inverse_transform_weights_for_mega_moe_sm90, wanted=False)
                self._plain = True

    def _turn(self, turn: Any, *, wanted: bool) -> None:
        if self.ready is wanted:
            return
        refuse_capture("experts cannot be reordered", "load weights before the capture")
        device = self.l1[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a launch on another stream may still read them
        turn(self.l1, self.l2, inplace=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # who writes next may be on another stream
