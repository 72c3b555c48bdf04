"""The buffer of layers whose experts are spread over the ranks of a group: one for all layers of the same sizes."""

from __future__ import annotations

import threading
from collections.abc import Collection, Set
from typing import Any, NamedTuple

import torch

from megamoe_jit._fork import renew_after_fork
from megamoe_jit._layer import calls
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import FP8, WeightFormat
from megamoe_jit.engines.apart import made_apart
from megamoe_jit.engines.aside import tell_served
from megamoe_jit.engines.watch import watch


class _Made(NamedTuple):
    buffer: SymmBuffer
    group: Any  #: kept, since its id is in the key
    formats: Set[str]  #: that kernels were prepared for


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
    with _lock:
        found = _buffers.get(key)
        missing = [each for each in weights if found is None or each.name not in found.formats]
        if found is None or missing:
            names = {each.name for each in missing}
            made = made_apart(lambda: _prepared(_buffers.get(key), group, sizes, activation, names))
            if found is None:
                watch(made.buffer)
            _buffers[key] = found = made
            for each in missing:
                tell_served(made.buffer.shape, made.buffer.ranks, each, tokens)
        return found.buffer


def _prepared(
    found: _Made | None, group: Any, sizes: tuple[int, int, int, int, int], activation: str, formats: Set[str]
) -> _Made:
    """A buffer, a new one where none was found, with the kernels of more formats."""
    if found is None:
        found = _Made(calls.get_symm_buffer_for_mega_moe(group, *sizes, activation=activation), group, frozenset())
    for name in sorted(formats):
        found.buffer.prepare_all(weight_format=name)  # none is compiled in a capture, or by one rank alone
    return found._replace(formats=found.formats | formats)
