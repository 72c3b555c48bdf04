"""Weights of one matrix from one order into the other, one expert after the other, and back where that is ended.

In place an expert's new bytes are made beside it, and then written: what ends that (Ctrl-C, no memory) has them
written all the same, and the experts before it brought back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamoe_jit._layer.binades import NORMAL, Bounds, power_of_two, refuse_inexact
from megamoe_jit._layer.from_mxfp4 import block_bounds, round_groups
from megamoe_jit._layer.given_weights import WeightTensors, readable_scales, refuse_nan, stacked, written_parts
from megamoe_jit._layer.marks import UNFINISHED, Span, layout_of, mark, order_of, spans
from megamoe_jit._layer.mxfp4 import absolute_exponents, relative_exponents
from megamoe_jit._spec.formats import WeightFormat

_NEXT = "fp8_from_mxfp4 makes FP8 of them, in e5m2 of up to 32 binades; "


def order_groups(
    codes: torch.Tensor, e8m0: torch.Tensor, found: Bounds, weights: WeightFormat, *, gated: bool, rounded: bool
) -> WeightTensors:
    """The tensors of one matrix as the kernel reads them, of a format with groups; new ones.

    Args:
        codes: uint8 ``[rows, bytes of a row]``.
        e8m0: uint8 ``[rows, groups of a row]``.
        found: bounds of its blocks.
        weights: the format.
        gated: it is the first matrix.
        rounded: some blocks may not be exact, and are rounded.
    """
    scales = power_of_two(found.chosen)
    if rounded:
        codes, e8m0 = round_groups(codes, e8m0, found)
    return weights.pack(codes, gated), weights.pack_exponents(relative_exponents(e8m0, scales), gated), scales


class Job(NamedTuple):
    """What becomes of one matrix of the chosen experts, once it is known that it can."""

    weights: WeightFormat
    name: str  #: l1 or l2
    given: WeightTensors
    forth: bool
    chosen: list[int]
    inplace: bool
    scales: torch.Tensor  #: of all experts
    found: Bounds | None = None  #: of the chosen experts' blocks, where scales are to be made
    rounded: bool = False  #: blocks that are not exact

    @property
    def mark(self) -> str | None:
        """Of what is written."""
        return f"{layout_of(self.weights)}/{self.name}" if self.forth else None

    def ordered(self, place: int, codes: torch.Tensor, exponents: torch.Tensor | None = None) -> WeightTensors:
        """The tensors of a matrix in their new order, of the expert that is chosen in this place; new ones."""
        weights, gated = self.weights, self.name == "l1"
        if exponents is None:
            return (weights.pack(codes, gated) if self.forth else weights.unpack(codes, gated),)
        if self.found is not None:
            blocks = self.found.of(place)
            return order_groups(codes, exponents, blocks, weights, gated=gated, rounded=self.rounded)
        unpacked, scales = weights.unpack_exponents(exponents, gated), stacked(self.scales)[self.chosen[place]]
        return weights.unpack(codes, gated), absolute_exponents(unpacked, scales)


def plan(
    weights: WeightFormat, name: str, given: WeightTensors, forth: bool, chosen: list[int], inplace: bool, rounded: bool
) -> Job:
    """What is to be done with a matrix; raises `ConfigError` if its values cannot be kept."""
    if not weights.group or not forth:
        return Job(weights, name, given, forth, chosen, inplace, readable_scales(given[-1]))
    codes, e8m0 = written_parts(given, weights)
    for e in chosen:
        refuse_nan(f"{name} expert {e}", e8m0[e])
    if len(given) == 3:
        scales = given[2] if inplace else given[2].clone(memory_format=torch.contiguous_format)
    else:
        *lead, rows, stored = given[0].shape
        shape = (*lead, *weights.scale_shape(rows, weights.depth_of(stored)))
        scales = torch.ones(shape, dtype=weights.scale_dtype, device=codes.device)
    found = block_bounds([(codes[e], e8m0[e]) for e in chosen], NORMAL) if chosen else None
    if found is not None and not rounded:
        refuse_inexact(f"{name} weights", found, NORMAL, _NEXT, chosen)
    return Job(weights, name, given, forth, chosen, inplace, scales, found, rounded)


def apply(job: Job) -> WeightTensors:
    """The tensors of a matrix with the chosen experts in their new order, and marked as being in it."""
    sources = written_parts(job.given, job.weights)
    if job.inplace:
        targets = sources
    elif len(job.chosen) == sources[0].shape[0]:
        targets = [torch.empty_like(source, memory_format=torch.contiguous_format) for source in sources]
    else:
        targets = [source.clone(memory_format=torch.contiguous_format) for source in sources]
    places = [spans(target) for target in targets]
    for source, target, where in zip(sources, targets, places, strict=True) if not job.inplace else ():
        for e in set(range(len(where))).difference(job.chosen):
            mark(target, [where[e]], order_of(source, spans(source)[e]))
    for place, e in enumerate(job.chosen):
        made = job.ordered(place, *(source[e] for source in sources))
        bytes_of = [(target, [where[e]]) for target, where in zip(targets, places, strict=True)]
        parts = [(target[e], part) for target, part in zip((*targets, stacked(job.scales)), made, strict=False)]
        try:
            _write(parts, bytes_of, job.mark)
        except BaseException:  # as by Ctrl-C
            _write(parts, bytes_of, job.mark)
            raise
    return _as_given(job, targets)


def _write(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    where: list[tuple[torch.Tensor, list[Span]]],
    order: str | None,
) -> None:
    """Copy an expert's new bytes into their place; what ends it meanwhile leaves it marked as unfinished."""
    for target, places in where:
        mark(target, places, UNFINISHED)
    for target, part in parts:
        target.copy_(part)
    for target, places in where:
        mark(target, places, order)


def undo(job: Job) -> None:
    """Bring those experts of a matrix back that a job in place which was ended has written."""
    tensors = written_parts(job.given, job.weights)
    done = [e for e in job.chosen if all(order_of(each, spans(each)[e]) == job.mark for each in tensors)]
    if job.forth:
        back = job._replace(forth=False, chosen=done, found=None)
    else:
        back = plan(job.weights, job.name, job.given, True, done, inplace=True, rounded=False)
    apply(back)


def _as_given(job: Job, targets: list[torch.Tensor]) -> WeightTensors:
    """What a transform returns: tensors shaped like those that were given, and a format's third one or not."""
    if not job.weights.group:
        like = job.given[0]
        return like if job.inplace else targets[0].view(like.shape).view(like.dtype), job.scales
    codes, exponents = (target.view(part.shape) for target, part in zip(targets, job.given, strict=False))
    if not job.forth and len(job.chosen) == targets[0].shape[0]:
        return codes, exponents.view(torch.float8_e8m0fnu)
    return codes, exponents, job.scales
