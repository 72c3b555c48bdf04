"""The buffer of layers whose experts are spread over the ranks of a group: one for all layers of the same sizes."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from megamoe_jit._fork import renew_after_fork
from megamoe_jit._layer import calls
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import FP8, WeightFormat
from megamoe_jit.engines.apart import made_apart
from megamoe_jit.engines.ready import make_ready


class _Made(NamedTuple):
    buffer: SymmBuffer
    group: Any  #: kept, since its id is in the key
    formats: set[str]  #: that kernels were prepared for


_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_buffers: dict[tuple[Any, ...], _Made] = {}


def buffer_across(
    group: Any,
    experts: int,
    tokens: int,
    topk: int,
    hidden: int,
    intermediate: int,
    *,
    activation: str = "swiglu",
    weights: Collection[WeightFormat] = (FP8,),
) -> SymmBuffer:
    """The buffer of a group's layers of these sizes, with all its kernels; a collective where some are to be made.

    Args:
        group: the process group of the ranks that share the experts.
        experts: of all ranks.
        tokens: most tokens of a rank in one call.
        topk, hidden, intermediate, activation: as `get_symm_buffer_for_mega_moe` takes them.
        weights: the formats of the weights of calls to come.

    Raises:
        MegaMoeError: as there.
    """
    sizes = (experts, tokens, topk, hidden, intermediate)
    key = (id(group), *sizes, activation, torch.cuda.current_device() if torch.cuda.is_available() else None)

    def make() -> None:
        if key not in _buffers:
            made = calls.get_symm_buffer_for_mega_moe(group, *sizes, activation=activation)
            _buffers[key] = _Made(made, group, set())
        buffer, _, formats = _buffers[key]
        for each in weights:
            if each.name not in formats:
                make_ready(buffer, each, tokens)
                formats.add(each.name)

    with _lock:
        if key not in _buffers or not _buffers[key].formats.issuperset(each.name for each in weights):
            made_apart(make)
        return _buffers[key].buffer
