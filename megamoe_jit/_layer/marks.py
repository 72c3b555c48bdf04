"""Marks that say in which order the bytes of weights are: plain, or the kernel's.

Weights in another order give wrong results and no error, so a call takes marked weights alone, and nothing is brought
into the kernel's order twice. A mark is a range of bytes of a *storage* with the name of the order. It is kept as an
attribute of torch's storage object, which is one and the same for as long as the memory lives. Hence it

* is shared by all that shares the memory: `nn.Parameter`, `.data`, `detach()`, views, slices of experts;
* survives copies of experts over each other, as when experts are rebalanced;
* ends with the memory: other weights that come to lie at that address have none;
* costs a call nothing: it is looked at where shapes and strides are, once for each set of tensors.

A subclass of tensors would cost every operation a dispatch, and an attribute of a tensor is lost by `.data`, `detach()`
and slices, which is how serving engines wrap weights. What makes new memory (`clone()`, `to()`, a file, another
process) loses the mark: then a call refuses, and `mark_transformed` says that somebody knows better. What writes other
values over marked memory (`copy_` of weights that were loaded again) keeps it, and `transformed=False` says so before
they are transformed. The name has a version, so a file from another version's order is told apart. While an expert is
permuted in place it is in no order, and is marked so: what ends a transform half-way, such as Ctrl-C, must not make
weights that are transformed twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._spec.formats import FP8, MXFP4, WeightFormat
from megamoe_jit._text import shown

LAYOUT = "megamoe-sm90-2"  #: the order that this version's kernels read; another number for another order
_OF_FORMAT = {MXFP4.name: "-2"}  #: behind the name of a format whose order alone has changed since
METADATA_KEY = "megamoe_jit.layout"  #: of safetensors' metadata
UNFINISHED = "unfinished"  #: of bytes that are being written: who ends it leaves them in no order at all
_ATTRIBUTE = "_megamoe_jit_marks"

Span = tuple[int, int]  #: first byte, and that past the last, of a storage
_Mark = tuple[int, int, str]  #: a span and the order of its bytes

_lock = threading.Lock()
renew_after_fork(globals(), "_lock")


def spans(codes: torch.Tensor) -> list[Span]:
    """The bytes of each expert's matrix in the storage; of one-byte elements ``[experts, N, K]`` or one ``[N, K]``."""
    experts, *matrix = codes.shape if codes.ndim == 3 else (1, *codes.shape)
    *step, row, column = codes.stride()
    size = 1 + (matrix[0] - 1) * row + (matrix[1] - 1) * column
    begins = (int(codes.storage_offset() + expert * (step[0] if step else 0)) for expert in range(experts))
    return [(begin, begin + size) for begin in begins]


def _marks(codes: torch.Tensor) -> tuple[_Mark, ...]:
    return getattr(codes.untyped_storage(), _ATTRIBUTE, ())


def mark(codes: torch.Tensor, where: Iterable[Span], order: str | None) -> None:
    """Say of these bytes of the memory of `codes` that they are in `order`; None for plain, which has no mark."""
    storage = codes.untyped_storage()
    with _lock:
        marks = list(getattr(storage, _ATTRIBUTE, ()))
        for begin, end in where:
            kept = [part for each in marks for part in _without(each, begin, end)]
            marks = _joined(kept if order is None else [*kept, (begin, end, order)])
        setattr(storage, _ATTRIBUTE, tuple(marks))


def _without(each: _Mark, begin: int, end: int) -> list[_Mark]:
    """What is left of a mark outside of some bytes."""
    first, last, order = each
    parts = (first, min(last, begin), order), (max(first, end), last, order)
    return [part for part in parts if part[0] < part[1]]


def _joined(marks: list[_Mark]) -> list[_Mark]:
    """Sorted, and neighbours of one order made one, so that a tensor of many experts has one."""
    joined: list[_Mark] = []
    for begin, end, order in sorted(marks):
        if joined and joined[-1][1:] == (begin, order):
            begin = joined.pop()[0]
        joined.append((begin, end, order))
    return joined


def order_of(codes: torch.Tensor, span: Span) -> str | None:
    """The order that all of these bytes are in by their mark; None if none of them has one; "mixed" otherwise."""
    touched = [each for each in _marks(codes) if each[0] < span[1] and span[0] < each[1]]
    if not touched:
        return None
    begin, end, order = touched[0]
    return order if len(touched) == 1 and begin <= span[0] and span[1] <= end else "mixed"


def layout_of(weights: WeightFormat) -> str:
    """The order in which this version's kernels read weights of a format."""
    return LAYOUT if weights is FP8 else f"{LAYOUT}-{weights.name}{_OF_FORMAT.get(weights.name, '')}"


def require_marked(
    name: str,
    codes: torch.Tensor,
    where: Iterable[Span] | None = None,
    *,
    weights: WeightFormat = FP8,
    what: str = "weights",
) -> None:
    """Raise `ConfigError` unless all codes of `name` (l1 or l2), or those at `where`, are in the kernel's order.

    Args:
        name: l1 or l2, whose orders differ.
        codes: contiguous where `where` is None; or exponents.
        where: some experts' bytes; all of the tensor if None.
        weights: the format.
        what: the tensor, for people.
    """
    wanted = f"{layout_of(weights)}/{name}"
    begin = int(codes.storage_offset())
    for span in [(begin, begin + codes.numel())] if where is None else where:
        found = order_of(codes, span)
        if found != wanted and span[0] < span[1]:
            raise ConfigError(f"{name} {what} {_said(found, wanted)}")


_LEFT = "were left half-way by a transform that was ended, and must be loaded again"


def _said(found: str | None, wanted: str) -> str:
    if found is None:
        what = "are not marked as transformed"
    elif found == "mixed":
        what = "are in the kernel's order only in part"
    elif found == UNFINISHED:
        return f"{_LEFT}; allowed: {wanted}"
    else:
        what = f"are in the order {found}"
    return (
        f"{what}; allowed: {wanted}, which transform_weights_for_mega_moe_sm90 gives. If they are in that order and "
        "were copied or read from a file since, say so: mark_transformed(l1_weights, l2_weights)"
    )


def require_plain(
    name: str, codes: torch.Tensor, where: Iterable[Span] | None = None, *, what: str = "weights"
) -> None:
    """Raise `ConfigError` if codes of `name`, or those at `where`, are marked as being in an order of a kernel."""
    for span in spans(codes) if where is None else where:
        found = order_of(codes, span)
        if found is not None:
            said = f"{_LEFT}; allowed" if found == UNFINISHED else f"are transformed already ({found}); allowed"
            raise ConfigError(
                f"{name} {what} {said}: rows as they were quantised. If other "
                "values were written over them since, say so: mark_transformed(..., transformed=False)"
            )


def check_metadata(metadata: Mapping[str, str] | None, weights: WeightFormat) -> None:
    """Raise `ConfigError` unless a file's metadata say that its weights are in this version's order of their format."""
    found, wanted = metadata.get(METADATA_KEY) if isinstance(metadata, Mapping) else None, layout_of(weights)
    if found != wanted:
        raise ConfigError(
            f"metadata: {METADATA_KEY} is {shown(found)}; allowed: {wanted!r}, the order of this version. Weights of "
            "another one must be quantised and transformed again"
        )
