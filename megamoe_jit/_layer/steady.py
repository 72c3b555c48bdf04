"""`SteadyCalls`: what was found for the last call of each token count, for the next one with the very same options.

A model calls its layers with one set of options again and again. To check them each time would cost more host time than
to launch, so a call first asks here. Options are known by what they are, not by what they equal: 1 is no bool, however
often True was given before.
"""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch

from megamoe_jit._layer.bound_kernel import CallPlan
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._settings.settings import Settings, get_settings

MOST = 1024  #: token counts that are remembered at a time

_BF16 = torch.bfloat16


class SteadyCall(NamedTuple):
    """A call whose options were checked."""

    options: tuple[Any, ...]  #: as they were given
    settings: Settings  #: in force then
    plan: CallPlan
    tokens: int
    clamp: float  #: as the kernel takes it


class SteadyCalls:
    """Calls on one memory that need no further checks than that of `y`, which is another one each time.

    Args:
        hidden: columns of `y`.
        device: where it has to be.
    """

    def __init__(self, hidden: int, device: torch.device) -> None:
        self._hidden, self._device = hidden, device
        self._known: dict[tuple[int, torch.dtype], SteadyCall] = {}

    def find(self, y: torch.Tensor, l1: WeightTensors | None, options: tuple[Any, ...]) -> SteadyCall | None:
        """What is known of a call into `y` with weights of this type; None if it has to be checked."""
        try:
            tokens, columns = y.shape
            fits = y.dtype is _BF16 and columns == self._hidden and y.device == self._device
            if not fits or not y.is_contiguous() or y.data_ptr() & 15:
                return None
            known = self._known.get((tokens, l1[0].dtype))  # type: ignore[index]
        except Exception:  # costs nothing where they are tensors; the checks say what they are
            return None
        if known is None or known.settings is not get_settings() or not all(map(is_, options, known.options)):
            return None
        return known

    def note(self, l1: WeightTensors, call: SteadyCall) -> None:
        """Remember a call whose arguments are right, unless one can change, as a list can: such have no hash."""
        try:
            hash(call.options)
        except TypeError:
            return
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[call.tokens, l1[0].dtype] = call

    def forget(self) -> None:
        """Have the next calls checked again."""
        self._known.clear()
