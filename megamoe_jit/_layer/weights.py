"""Weights between the order they are quantised in and that in which the kernel reads them, which their format knows.

Nothing moves from one expert to another, so a transformed tensor can be permuted by expert like the original, and both
directions run in place with a few matrices of one expert as scratch. The memory is marked (`marks`), expert by expert:
what is transformed is not transformed again, what is not is not transformed back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.from_mxfp4 import check_rounding
from megamoe_jit._layer.given_weights import WeightTensors, by_old_names, check_pairs, chosen_experts, written
from megamoe_jit._layer.marks import METADATA_KEY, check_metadata, layout_of, mark, require_marked, require_plain, spans
from megamoe_jit._layer.places import require_dense, require_places
from megamoe_jit._layer.reorder import apply, plan, undo
from megamoe_jit._spec import WeightFormat, check_flag


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
    both = (("l1", l1), ("l2", l2))
    jobs = [plan(weights, name, given, forth, chosen, inplace, rounded) for name, given in both]
    try:
        w13, w2 = map(apply, jobs)
    except BaseException:
        for job in jobs if inplace else ():
            undo(job)
        raise
    return w13, w2


def _require_order(l1: WeightTensors, l2: WeightTensors, weights: WeightFormat, chosen: list[int], plain: bool) -> None:
    for name, what, tensor in written(l1, l2, weights):
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
        l1_weights: ``w13``, float8_e4m3fn or float8_e5m2 ``[E_local, 2I, H]``, gate rows first, then up rows, and its
            scales float32 ``[E_local, 2I / 128, H / 128]``; or one expert, without the first dimension. Of MXFP4: two
            codes to a byte, low nibble first, uint8, int8 or float4_e2m1fn_x2 ``[E_local, 2I, H / 2]``, and exponents
            float8_e8m0fnu or uint8 ``[E_local, 2I, H / 32]``; and where other experts are transformed already, the
            scales of the result.
        l2_weights: ``w2`` ``[E_local, H, I]`` and its scales ``[E_local, H / 128, I / 128]``, or MXFP4
            ``[E_local, H, I / 2]`` and ``[E_local, H, I / 32]``, of the same dtypes.
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

    What ends it half-way in place (Ctrl-C, no memory) leaves all experts as they were. Where bringing them back is
    ended too, each is marked as what it is, and one that is in no order is refused until it is loaded again.
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
        l1_weights: as that function returns it: codes in FP8 ``[E_local, 2I, H]`` and scales float32
            ``[E_local, 2I / 128, H / 128]``; or codes, exponents and scales of MXFP4; or one expert, without the first
            dimension.
        l2_weights: likewise; codes in FP8 ``[E_local, H, I]``, scales float32 ``[E_local, H / 128, I / 128]``.
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
        check_metadata(metadata, weights)
    for name, what, tensor in written(l1_weights, l2_weights, weights):
        require_dense(name, tensor, what)
        where = spans(tensor)
        order = f"{layout_of(weights)}/{name}" if transformed else None
        mark(tensor, [where[e] for e in chosen], order)


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
