"""`HeldExperts`: one layer's experts where an engine keeps them, brought into the kernel's order and back in place.

What calls read keeps its address, so captured graphs read new weights, and what an engine moves expert by expert (EPLB)
stays in the order it is in.
"""

from __future__ import annotations

import threading

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.given_weights import WeightTensors, check_pairs
from megamoe_jit._layer.weights import (
    inverse_transform_weights_for_mega_moe_sm90,
    is_transformed,
    transform_weights_for_mega_moe_sm90,
)
from megamoe_jit._spec import MoEShape, WeightFormat


class HeldExperts:
    """Experts of one layer, in an engine's parameters.

    Args:
        w13: two contiguous tensors. FP8: e4m3 ``[experts, 2 * intermediate, hidden]``, gate rows first, and float32
            scales ``[experts, 2 * intermediate / 128, hidden / 128]``. MXFP4: bytes of two codes ``[experts,
            2 * intermediate, hidden / 2]`` and e8m0 exponents, uint8 ``[experts, 2 * intermediate, hidden / 32]``.
        w2: ``[experts, hidden, intermediate]`` likewise.

    Attributes:
        l1, l2: what a call takes once they are in the kernel's order: these tensors themselves, and of MXFP4 the scales
            of blocks, which are this object's.
        weights: their format.
        experts, hidden, intermediate: their sizes.

    Raises:
        ConfigError: a dtype, a size or a place in memory is none that a kernel reads; nothing was written.
    """

    def __init__(self, w13: WeightTensors, w2: WeightTensors) -> None:
        self.l1: WeightTensors = tuple(each.detach() for each in w13)
        self.l2: WeightTensors = tuple(each.detach() for each in w2)
        self.weights: WeightFormat = check_pairs(self.l1, self.l2, ordered=False if len(w13) == 2 else None)
        codes = self.l1[0]
        if codes.ndim != 3:
            raise ConfigError(f"w13 has shape {tuple(codes.shape)}; allowed: [experts, 2 * intermediate, hidden]")
        self.experts, rows, stored = codes.shape
        self.hidden, self.intermediate = self.weights.depth_of(stored), rows // 2
        MoEShape(self.hidden, self.intermediate, self.experts, 1)  # raises where there is no kernel of these sizes
        for name, given in (("w13", self.l1), ("w2", self.l2)):
            check_tensor(f"{name} codes", given[0], given[0].dtype, given[0].shape, codes.device)
            exact = torch.uint8 if self.weights.group else torch.float32
            check_tensor(f"{name} scales", given[1], exact, given[1].shape, codes.device, align=4)
        if self.weights.group and self.ready:
            raise ConfigError("w13 codes are in the kernel's order, without their scales; allowed: as they were loaded")
        self._lock = threading.RLock()
        self._plain = False  #: known to be so: engines ask before each of thousands of writes

    def keeps(self, *tensors: torch.Tensor) -> bool:
        """Whether these are still the memory of both matrices, w13 first, each with its scales or exponents."""
        mine = (*self.l1[:2], *self.l2[:2])
        return all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(mine, tensors, strict=True))

    @property
    def ready(self) -> bool:
        """Whether they are in the kernel's order."""
        return is_transformed(self.l1, self.l2)

    def to_kernel(self) -> None:
        """Bring them into the kernel's order, unless they are.

        Raises:
            ConfigError: values of MXFP4 span more than the kernel keeps; nothing was written.
            CaptureError: the current stream is capturing.
        """
        with self._lock:
            self._plain = False
            if self.ready:
                return
            self._before()
            ordered = transform_weights_for_mega_moe_sm90(self.l1[:2], self.l2[:2], inplace=True)
            self.l1, self.l2 = (_kept(old, new) for old, new in zip((self.l1, self.l2), ordered, strict=True))
            self._after()

    def to_plain(self) -> None:
        """Bring them back into the engine's order, unless they are: before it writes others over them."""
        with self._lock:  # engines load experts by several threads
            if self._plain:
                return
            if self.ready:
                self._before()
                inverse_transform_weights_for_mega_moe_sm90(self.l1, self.l2, inplace=True)
                self._after()
            self._plain = True

    def _before(self) -> None:
        refuse_capture("experts cannot be reordered", "load weights before the capture")
        self._after()  # a launch on another stream may still read them

    def _after(self) -> None:
        device = self.l1[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # who writes or reads next may be on another stream


def _kept(old: WeightTensors, new: WeightTensors) -> WeightTensors:
    """The tensors of a matrix, its block scales at the address at which graphs know them."""
    if len(old) == 3 and len(new) == 3:
        old[2].copy_(new[2])
        return old
    return (*old[:2], *new[2:])
