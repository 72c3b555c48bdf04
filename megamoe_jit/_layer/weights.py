"""Weights between the order they are quantised in and that in which the kernel reads them, which their format knows.

Nothing moves from one expert to another, so a transformed tensor can be permuted by expert like the original, and both
directions run in place with a few matrices of one expert as scratch. The memory is marked (`marks`), expert by expert:
what is transformed is not transformed again, what is not is not transformed back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import marks as _marks
from megamoe_jit._layer.binades import NORMAL, Bounds, power_of_two, refuse_inexact
from megamoe_jit._layer.from_mxfp4 import block_bounds, check_rounding, round_groups
from megamoe_jit._layer.given_weights import (
    WeightTensors,
    by_old_names,
    check_pairs,
    chosen_experts,
    readable_scales,
    refuse_nan,
    stacked,
    written_parts,
)
from megamoe_jit._layer.marks import METADATA_KEY, UNFINISHED, layout_of, require_marked, require_plain, spans
from megamoe_jit._layer.mxfp4 import absolute_exponents, relative_exponents
from megamoe_jit._layer.places import require_dense, require_places
from megamoe_jit._spec import check_flag
from megamoe_jit._spec.formats import WeightFormat

__all__ = [
    "inverse_transform_weights_for_mega_moe_sm90",
    "is_transformed",
    "mark_transformed",
    "transform_weights_for_mega_moe_sm90",
    "weights_metadata",
]

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


class _Job(NamedTuple):
    """What becomes of one matrix of the chosen experts, once it is known that it can."""

    weights: WeightFormat
    name: str  #: l1 or l2
    forth: bool
    chosen: list[int]
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


def _plan(
    weights: WeightFormat, name: str, given: WeightTensors, forth: bool, chosen: list[int], inplace: bool, rounded: bool
) -> _Job:
    """What is to be done with a matrix; raises `ConfigError` if its values cannot be kept."""
    if not weights.group or not forth:
        return _Job(weights, name, forth, chosen, readable_scales(given[-1]))
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
    return _Job(weights, name, forth, chosen, scales, found, rounded)


def _apply_to(given: WeightTensors, job: _Job, inplace: bool) -> WeightTensors:
    """The tensors of a matrix with the chosen experts in their new order, and marked as being in it."""
    sources = written_parts(given, job.weights)
    if inplace:
        targets = sources
    elif len(job.chosen) == sources[0].shape[0]:
        targets = [torch.empty_like(source, memory_format=torch.contiguous_format) for source in sources]
    else:
        targets = [source.clone(memory_format=torch.contiguous_format) for source in sources]
    places = [spans(target) for target in targets]
    for source, target, where in zip(sources, targets, places, strict=True) if not inplace else ():
        for e in set(range(len(where))).difference(job.chosen):
            _marks.mark(target, [where[e]], _marks.order_of(source, spans(source)[e]))
    for place, e in enumerate(job.chosen):
        made = job.ordered(place, *(source[e] for source in sources))
        for target, where in zip(targets, places, strict=True) if inplace else ():
            _marks.mark(target, [where[e]], UNFINISHED)
        for target, part in zip((*targets, stacked(job.scales)), made, strict=False):
            target[e].copy_(part)
        for target, where in zip(targets, places, strict=True):
            _marks.mark(target, [where[e]], job.mark)
    return _as_given(given, targets, job, inplace)


def _as_given(given: WeightTensors, targets: list[torch.Tensor], job: _Job, inplace: bool) -> WeightTensors:
    """What a transform returns: tensors shaped like those that were given, and a format's third one or not."""
    if not job.weights.group:
        codes = given[0] if inplace else targets[0].view(given[0].shape).view(given[0].dtype)
        return codes, job.scales
    codes, exponents = (target.view(part.shape) for target, part in zip(targets, given, strict=False))
    if not job.forth and len(job.chosen) == targets[0].shape[0]:
        return codes, exponents.view(torch.float8_e8m0fnu)
    return codes, exponents, job.scales


@torch.no_grad()
def _apply(
    forth: bool,
    l1: WeightTensors,
    l2: WeightTensors,
    inplace: bool,
    experts: Iterable[int] | None,
    rounding: str | None = None,
) -> tuple[WeightTensors, WeightTensors]:
    # it would be done by each replay again, and not now
    refuse_capture("weights cannot be brought into another order", "do it before the capture")
    weights = check_pairs(l1, l2, ordered=None if forth else True)
    check_flag("inplace", inplace)
    rounded = check_rounding(rounding)
    chosen = chosen_experts(experts, l1[0])
    if inplace:
        require_places(l1, l2, weights, forth)
    _require_order(l1, l2, weights, chosen, forth)
    both = [("l1", l1), ("l2", l2)]
    jobs = [_plan(weights, name, given, forth, chosen, inplace, rounded) for name, given in both]
    w13, w2 = (_apply_to(given, job, inplace) for (_, given), job in zip(both, jobs, strict=True))
    return w13, w2


def _require_order(l1: WeightTensors, l2: WeightTensors, weights: WeightFormat, chosen: list[int], plain: bool) -> None:
    for name, given in (("l1", l1), ("l2", l2)):
        for what, tensor in zip(("weights", "exponents"), written_parts(given, weights), strict=False):
            where = [spans(tensor)[e] for e in chosen]
            if plain:
                require_plain(name, tensor, where, what=what)
            else:
                require_marked(name, tensor, where, weights=weights, what=what)


def transform_weights_for_mega_moe_sm90(
    l1_weights: WeightTensors | None = None,
    l2_weights: WeightTensors | None = None,
    *,
    inplace: bool = False,
    experts: Iterable[int] | None = None,
    rounding: str | None = None,
    l1: WeightTensors | None = None,
    l2: WeightTensors | None = None,
) -> tuple[WeightTensors, WeightTensors]:
    """Bring quantised weights into the order the kernel reads, and mark them as being in it.

    Args:
        l1_weights: ``w13`` float8_e4m3fn ``[E_local, 2I, H]``, gate rows first, then up rows, and its scales float32
            ``[E_local, 2I / 128, H / 128]``; or one expert, without the first dimension. Of MXFP4: two codes to a byte,
            uint8, int8 or float4_e2m1fn_x2 ``[E_local, 2I, H / 2]``, low nibble first, and exponents float8_e8m0fnu or
            uint8 ``[E_local, 2I, H / 32]``; and where other experts are transformed already, the scales of the result.
        l2_weights: ``w2`` float8_e4m3fn ``[E_local, H, I]`` and its scales float32 ``[E_local, H / 128, I / 128]``, or
            MXFP4 ``[E_local, H, I / 2]`` and ``[E_local, H, I / 32]``.
        inplace: Permute codes, and exponents, where they are and return them, with a few matrices of one expert as
            scratch.
        experts: Only these local experts; the others keep their order.
        rounding: What to do with MXFP4 values that no scale of their block of 128 x 128 keeps, as they span more than
            30 binades: refuse them (None), or round the smallest of them ("nearest").
        l1, l2: The old names of the first two.

    Returns:
        Both pairs with codes of the same shape, in the kernel's order, and the scales that were given. Codes that are
        not in place start at a multiple of 16 bytes, as the kernel needs it; scales are copied where their rows do not
        follow each other or they do not start at a multiple of 4. Of MXFP4: codes and exponents as uint8 of the same
        shapes, and new scales float32 ``[E_local, 2I / 128, H / 128]`` and ``[E_local, H / 128, I / 128]``, which are
        1 for experts that were not chosen.

    Raises:
        ConfigError: A dtype, shape or expert number is not supported, an expert is transformed already, codes that
            are to be permuted in place share memory, or values cannot be kept. Nothing was written.
        CaptureError: the current stream is capturing a CUDA graph.

    What ends it half-way in place (Ctrl-C, no memory) leaves experts that are transformed, some that are not, and at
    most one in no order, all marked as what they are: the last one is refused until it is loaded again.
    """
    l1_weights, l2_weights = by_old_names(l1_weights, l2_weights, l1, l2)
    return _apply(True, l1_weights, l2_weights, inplace, experts, rounding)


def inverse_transform_weights_for_mega_moe_sm90(
    l1_weights: WeightTensors | None = None,
    l2_weights: WeightTensors | None = None,
    *,
    inplace: bool = False,
    experts: Iterable[int] | None = None,
    l1: WeightTensors | None = None,
    l2: WeightTensors | None = None,
) -> tuple[WeightTensors, WeightTensors]:
    """Undo `transform_weights_for_mega_moe_sm90`, of weights that are marked.

    Args:
        l1_weights: as that function returns it: codes float8_e4m3fn ``[E_local, 2I, H]`` and scales float32
            ``[E_local, 2I / 128, H / 128]``; or codes, exponents and scales of MXFP4; or one expert, without the first
            dimension.
        l2_weights: likewise; codes float8_e4m3fn ``[E_local, H, I]``, scales float32 ``[E_local, H / 128, I / 128]``.
        inplace: Permute codes, and exponents, where they are and return them, with a few matrices of one expert as
            scratch.
        experts: Only these local experts; the others keep their order.
        l1, l2: The old names of the first two.

    Returns:
        `l1_weights` with gate rows first, then up rows, and `l2_weights`, both with rows of consecutive bytes. Of
        MXFP4: codes uint8 and exponents float8_e8m0fnu, bit by bit those that were given unless they were rounded; with
        the scales, and uint8 exponents, where not all experts were chosen.

    Raises:
        ConfigError: A dtype, shape or expert number is not supported, or the weights are not marked as transformed.
        CaptureError: the current stream is capturing a CUDA graph.
    """
    l1_weights, l2_weights = by_old_names(l1_weights, l2_weights, l1, l2)
    return _apply(False, l1_weights, l2_weights, inplace, experts)


def mark_transformed(
    l1_weights: WeightTensors,
    l2_weights: WeightTensors,
    *,
    experts: Iterable[int] | None = None,
    transformed: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Say that weights are in the kernel's order, where no mark tells: they were copied, or come from elsewhere.

    A mark belongs to memory. It goes along with views, `nn.Parameter`, `.data` and slices of experts, but not with
    `clone()`, `to()`, files and other processes. Nothing is checked but what `metadata` say.

    Args:
        l1_weights, l2_weights: as `transform_weights_for_mega_moe_sm90` gave them.
        experts: these local experts alone.
        transformed: False says that they are plain: other values were written over them.
        metadata: of the file they were read from, as `weights_metadata` gave them.

    Raises:
        ConfigError: these are no weights, or the metadata name no order or that of another version.
    """
    check_flag("transformed", transformed)
    weights = check_pairs(l1_weights, l2_weights, ordered=True if transformed else None)
    chosen = chosen_experts(experts, l1_weights[0])
    if metadata is not None:
        _marks.check_metadata(metadata, weights)
    for name, given in (("l1", l1_weights), ("l2", l2_weights)):
        for what, tensor in zip(("weights", "exponents"), written_parts(given, weights), strict=False):
            require_dense(name, tensor, what)
            where = spans(tensor)
            order = f"{layout_of(weights)}/{name}" if transformed else None
            _marks.mark(tensor, [where[e] for e in chosen], order)


def is_transformed(l1_weights: WeightTensors, l2_weights: WeightTensors) -> bool:
    """Whether all experts' weights are marked as being in the order this version's kernels read.

    Args:
        l1_weights, l2_weights: codes and scales, shaped as `transform_weights_for_mega_moe_sm90` takes them.

    Returns:
        False too where some experts are and others are not.

    Raises:
        ConfigError: these are no weights.
    """
    weights = check_pairs(l1_weights, l2_weights)
    try:
        _require_order(l1_weights, l2_weights, weights, chosen_experts(None, l1_weights[0]), plain=False)
    except ConfigError:
        return False
    return True


def weights_metadata(l1_weights: WeightTensors, l2_weights: WeightTensors) -> dict[str, str]:
    """What to write into a file beside transformed weights (safetensors' `metadata`), for `mark_transformed` to read.

    Args:
        l1_weights, l2_weights: as `transform_weights_for_mega_moe_sm90` gave them.

    Returns:
        One entry: the name of the order they are in.

    Raises:
        ConfigError: they are not marked as transformed.
    """
    weights = check_pairs(l1_weights, l2_weights)
    _require_order(l1_weights, l2_weights, weights, chosen_experts(None, l1_weights[0]), plain=False)
    return {METADATA_KEY: layout_of(weights)}
