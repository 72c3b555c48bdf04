"""What a buffer of an engine goes through before its first call."""

from __future__ import annotations

from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import WeightFormat
from megamoe_jit.engines.aside import tell_served
from megamoe_jit.engines.watch import watch


def make_ready(buffer: SymmBuffer, weights: WeightFormat, tokens: int) -> None:
    """Prepare all kernels of a format: none may be compiled in a capture, or by one rank alone. Say so, and watch it.

    Args:
        buffer: of this rank or of a group, whose ranks all come here.
        weights: their format in calls to come.
        tokens: most of a launch.

    Raises:
        MegaMoeError: as `SymmBuffer.prepare_all`.
    """
    buffer.prepare_all(weight_format=weights.name)
    watch(buffer)
    tell_served(buffer.shape, buffer.ranks, weights, tokens)
