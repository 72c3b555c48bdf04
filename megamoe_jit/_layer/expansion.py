"""`ExpandedWeights`: the memory in which a kernel that expands packed weights has them while a call runs."""

from __future__ import annotations

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._device.layout import expanded_parts
from megamoe_jit._device.params import Params
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.memory import Place
from megamoe_jit._text import first_line

__all__ = ["ExpandedWeights"]


class ExpandedWeights:
    """Room for the e5m2 codes of one layer, and the counters of what is expanded; all layers of a buffer share it.

    Calls on one buffer follow each other, and each expands before it reads. It lives as long as the buffer, whose
    kernels, also those in CUDA graphs, have its address.

    Args:
        place: the memory of the layer.
        experts: those whose weights are on this rank.

    Raises:
        CaptureError: the current stream is capturing a CUDA graph.
        ConfigError: there is not so much memory (says the bytes).
    """

    def __init__(self, place: Place, experts: int) -> None:
        shape = place.shape
        refuse_capture(
            "the memory that packed weights are expanded in cannot be made",
            'call the buffer\'s prepare("prefill", weight_format="mxfp4") before the capture',
        )
        first, second, counters = expanded_parts(shape, experts)
        wanted = first + second + counters
        try:
            with torch.inference_mode(False):
                self.memory = torch.empty(wanted, dtype=torch.uint8, device=place.device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{experts} experts of {shape} need {wanted} bytes to expand their weights in: {first_line(error)}; "
                'allowed: as much memory, or variant = "unpack", which needs none'
            ) from None
        torch.cuda.synchronize(place.device)  # who had it before is done, whatever stream comes first
        self._parts = first, first + second

    def show(self, params: Params) -> None:
        """Write its addresses where the kernel looks for them."""
        base = self.memory.data_ptr()
        params.weight1 = params.expanded1 = base
        params.weight2 = params.expanded2 = base + self._parts[0]
        params.expanded = base + self._parts[1]
