"""`ExpandedWeights`: the memory in which a kernel that expands packed weights has them while a call runs."""

from __future__ import annotations

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.memory import Place
from megamoe_jit._spec.formats import ExpandedParts
from megamoe_jit._text import first_line


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
        self._parts = ExpandedParts.of(shape.hidden, shape.intermediate, experts)
        wanted = sum(self._parts)
        try:
            with torch.inference_mode(False):
                self.memory = torch.empty(wanted, dtype=torch.uint8, device=place.device)
        except torch.OutOfMemoryError as error:
            # several ranks prepare all variants that their tokens may lead to
            other = "a buffer for fewer tokens" if place.ranks > 1 else 'variant = "unpack"'
            raise ConfigError(
                f"{experts} experts of {shape} need {wanted} bytes to expand their weights in: {first_line(error)}; "
                f"allowed: as much memory, or {other}, which needs none"
            ) from None
        torch.cuda.synchronize(place.device)  # who had it before is done, whatever stream comes first

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the codes of the first matrices, of those of the second ones, and of the counters."""
        base = self.memory.data_ptr()
        return base, base + self._parts.first, base + self._parts.first + self._parts.second
