"""The buffer of layers whose experts are spread over the ranks of a group: one for all layers of the same sizes."""

from __future__ import annotations

import threading
from typing import Any

import torch

from megamoe_jit._fork import renew_after_fork
from megamoe_jit._layer import calls
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import FP8, WeightFormat

__all__ = ["buffer_across"]

_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_buffers: dict[tuple[Any, ...], tuple[SymmBuffer, Any]] = {}  #: with the group, whose id is in the key


def buffer_across(
    group: Any,
    experts: int,
    tokens: int,
    topk: int,
    hidden: int,
    intermediate: int,
    *,
    activation: str = "swiglu",
    weights: WeightFormat = FP8,
) -> SymmBuffer:
    """The buffer of a group's layers of these sizes, with all its kernels; a collective the first time.

    Args:
        group: the process group of the ranks that share the experts.
        experts: of all ranks.
        tokens: most tokens of a rank in one call.
        topk, hidden, intermediate, activation: as `get_symm_buffer_for_mega_moe` takes them.
        weights: the format of the weights of calls to come.

    Raises:
        MegaMoeError: as there.
    """
    sizes = (experts, tokens, topk, hidden, intermediate)
    key = (
        id(group),
        *sizes,
        activation,
        weights.name,
        torch.cuda.current_device() if torch.cuda.is_available() else None,
    )
    with _lock:
        if key not in _buffers:
            made = calls.get_symm_buffer_for_mega_moe(group, *sizes, activation=activation)
            made.prepare_all(weight_format=weights.name)  # none is compiled in a capture, or by one rank alone
            _buffers[key] = made, group
        return _buffers[key][0]
