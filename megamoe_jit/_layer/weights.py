"""Weights between the order they are quantised in and that in which the kernel reads them, which their format knows.

Nothing moves from one expert to another, so a transformed tensor can be permuted by expert like the original, and both
directions run in place with a few matrices of one expert as scratch. The memory is marked (`marks`), expert by expert:
what is transformed is not transformed again, what is not is not transformed back.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import marks as _marks
from megamoe_jit._layer.marks import LAYOUT, METADATA_KEY, require_marked, require_plain, spans
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._spec import BLOCK, check_flag
from megamoe_jit._spec.formats import FP8, WeightFormat
from megamoe_jit._text import shown

__all__ = [
    "WeightPair",
    "by_old_names",
    "check_pairs",
    "inverse_transform_weights_for_mega_moe_sm90",
    "is_transformed",
    "mark_transformed",
    "readable_scales",
    "require_pair",
    "transform_weights_for_mega_moe_sm90",
    "weights_metadata",
]

WeightPair: TypeAlias = tuple[torch.Tensor, torch.Tensor]  #: codes and scales


class _Direction(NamedTuple):
    """Forth or back, of both matrices, and the format that knows the order."""

    weights: WeightFormat
    forth: bool

    def order(self, codes: torch.Tensor, gated: bool) -> torch.Tensor:
        """The bytes of one expert's matrix in their new order; a new tensor."""
        return self.weights.pack(codes, gated) if self.forth else self.weights.unpack(codes, gated)


_FORTH, _BACK = _Direction(FP8, True), _Direction(FP8, False)


def require_pair(name: str, pair: object) -> WeightPair:
    """The pair; raises `ConfigError` unless it is two tensors."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        given = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, tuple | list) else type(pair).__name__
        raise ConfigError(f"{name}: {given} given; allowed: a pair of tensors, codes and scales")
    require_tensor(f"{name} weights", pair[0])
    require_tensor(f"{name} scales", pair[1])
    return pair[0], pair[1]


def _check_pair(name: str, pair: WeightPair, weights: WeightFormat) -> None:
    require_pair(name, pair)
    codes, scales = pair
    if codes.dtype is not weights.code_dtype:
        raise ConfigError(f"{name} weights are {codes.dtype}; allowed: {weights.code_dtype}")
    if scales.dtype is not weights.scale_dtype:
        raise ConfigError(f"{name} scales are {scales.dtype}; allowed: {weights.scale_dtype}")
    if codes.ndim not in (2, 3):
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: [experts, N, K] or one [N, K]")
    *lead, n, stored = codes.shape
    k = stored * 8 // weights.bits
    if n == 0 or n % BLOCK or k == 0 or k % BLOCK:
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: N and K multiples of 128")
    for what, tensor in (("weights", codes), ("scales", scales)):
        if tensor.device.type == "meta":
            raise ConfigError(f"{name} {what} are on meta, which holds no values; allowed: a device with memory")
    expected = (*lead, *weights.scale_shape(n, k))
    if tuple(scales.shape) != expected:
        block = " x ".join(map(str, weights.scale_block))
        raise ConfigError(f"{name} scales have shape {tuple(scales.shape)}; allowed: {expected}, one per {block}")


def check_pairs(l1: WeightPair, l2: WeightPair, weights: WeightFormat = FP8) -> None:
    """Raise unless these are codes and scales of both matrices of some experts, or of one, in this format."""
    _check_pair("l1", l1, weights)
    _check_pair("l2", l2, weights)
    *lead, rows, stored = l1[0].shape
    hidden = stored * 8 // weights.bits
    if rows % (2 * BLOCK):
        raise ConfigError(f"l1 weights have {rows} rows; allowed: 2 x intermediate, a multiple of 256")
    expected = (*lead, *weights.code_shape(hidden, rows // 2))
    if tuple(l2[0].shape) != expected:
        raise ConfigError(
            f"l2 weights have shape {tuple(l2[0].shape)}; allowed: {expected}, to fit l1 {tuple(l1[0].shape)}"
        )


def readable_scales(scales: torch.Tensor) -> torch.Tensor:
    """The scales as the kernel reads them, float by float: rows one after the other, at a multiple of four bytes.

    These themselves where they are so already, as a slice of experts is; otherwise a copy.
    """
    fits = scales.is_contiguous() and scales.data_ptr() % scales.itemsize == 0
    return scales if fits else scales.clone(memory_format=torch.contiguous_format)


def _chosen(experts: Iterable[int] | None, codes: torch.Tensor) -> list[int]:
    if codes.ndim == 2:
        if experts is not None:
            raise ConfigError("experts was given with one [2I, H] matrix; allowed: only with [experts, 2I, H]")
        return [0]
    count = codes.shape[0]
    try:
        chosen = list(range(count)) if experts is None else [operator.index(e) for e in experts]
    except (TypeError, RuntimeError):
        raise ConfigError(
            f"experts = {shown(experts)}; allowed: distinct local experts from 0 to {count - 1}"
        ) from None
    if len(set(chosen)) != len(chosen) or any(not 0 <= e < count for e in chosen):
        raise ConfigError(f"experts = {shown(chosen)}; allowed: distinct local experts from 0 to {count - 1}")
    return chosen


def _apply_to(name: str, codes: torch.Tensor, direction: _Direction, inplace: bool, chosen: list[int]) -> torch.Tensor:
    """Codes of `l1` or `l2` with the chosen experts in their new order, and marked as being in it."""
    source = codes.view(torch.uint8).unsqueeze(0) if codes.ndim == 2 else codes.view(torch.uint8)
    given = spans(source)
    if inplace:
        target = source
    elif len(chosen) == source.shape[0]:
        target = torch.empty_like(source, memory_format=torch.contiguous_format)
    else:
        target = source.clone(memory_format=torch.contiguous_format)
    made = given if inplace else spans(target)
    for e in set(range(len(made))).difference(chosen) if not inplace else ():
        _marks.mark(target, [made[e]], _marks.order_of(source, given[e]))
    for e in chosen:
        target[e].copy_(direction.order(source[e], gated=name == "l1"))
        _marks.mark(target, [made[e]], f"{LAYOUT}/{name}" if direction.forth else None)
    return codes if inplace else target.view(codes.shape).view(codes.dtype)


def _require_dense(name: str, codes: torch.Tensor) -> None:
    """Raise unless each expert's rows follow each other."""
    experts = codes.unsqueeze(0) if codes.ndim == 2 else codes
    if not experts[:1].squeeze(0).is_contiguous():
        raise ConfigError(
            f"{name} weights have strides {codes.stride()}; allowed in place: each expert's rows one after the other, "
            "as the kernel reads them"
        )


def _require_places(l1: WeightPair, l2: WeightPair) -> None:
    """Raise unless every code of both can be written without another code, or a scale, being changed."""
    taken: list[tuple[int, int, str, str]] = []
    for name, (codes, scales) in (("l1", l1), ("l2", l2)):
        _require_dense(name, codes)
        start = codes.data_ptr() - int(codes.storage_offset())
        taken += [(start + begin, start + end, name, "weights") for begin, end in spans(codes)]
        extent = sum((n - 1) * int(step) for n, step in zip(scales.shape, scales.stride(), strict=True)) + 1
        taken.append((scales.data_ptr(), scales.data_ptr() + scales.itemsize * extent, name, "scales"))
    furthest = {"weights": (0, ""), "scales": (0, "")}
    for begin, end, name, kind in sorted(taken):
        rivals = ("weights", "scales") if kind == "weights" else ("weights",)  # scales are not written
        for other, (reach, whose) in ((rival, furthest[rival]) for rival in rivals):
            if begin < reach and begin < end:
                what = f"elements of {name} {kind} are elements of {whose} {other} too"
                raise ConfigError(f"{what}; allowed with inplace=True: each element in a place of its own")
        furthest[kind] = max(furthest[kind], (end, name))


@torch.no_grad()
def _apply(
    direction: _Direction, l1: WeightPair, l2: WeightPair, inplace: bool, experts: Iterable[int] | None
) -> tuple[WeightPair, WeightPair]:
    check_pairs(l1, l2, direction.weights)
    check_flag("inplace", inplace)
    chosen = _chosen(experts, l1[0])
    if inplace:
        _require_places(l1, l2)
    _require_order(l1, l2, chosen, direction.forth)
    w13 = _apply_to("l1", l1[0], direction, inplace, chosen)
    w2 = _apply_to("l2", l2[0], direction, inplace, chosen)
    return (w13, readable_scales(l1[1])), (w2, readable_scales(l2[1]))


def _require_order(l1: WeightPair, l2: WeightPair, chosen: list[int], plain: bool) -> None:
    for name, (codes, _) in (("l1", l1), ("l2", l2)):
        where = [spans(codes)[e] for e in chosen]
        (require_plain if plain else require_marked)(name, codes, where)


def by_old_names(
    l1_weights: WeightPair | None, l2_weights: WeightPair | None, l1: WeightPair | None, l2: WeightPair | None
) -> tuple[WeightPair, WeightPair]:
    """Both pairs, of a caller who may have given them by the old names `l1` and `l2`.

    Raises:
        ConfigError: one is missing, or given twice.
    """
    pairs = []
    for name, new, old in (("l1", l1_weights, l1), ("l2", l2_weights, l2)):
        if new is not None and old is not None:
            raise ConfigError(f"{name}_weights and {name} were given; allowed: {name}_weights alone")
        pairs.append(require_pair(name, new if new is not None else old))
    if l1 is not None or l2 is not None:
        new_names = "l1 and l2 are now named l1_weights and l2_weights; the old names will go"
        warnings.warn(new_names, DeprecationWarning, stacklevel=3)
    return pairs[0], pairs[1]


def transform_weights_for_mega_moe_sm90(
    l1_weights: WeightPair | None = None,
    l2_weights: WeightPair | None = None,
    *,
    inplace: bool = False,
    experts: Iterable[int] | None = None,
    l1: WeightPair | None = None,
    l2: WeightPair | None = None,
) -> tuple[WeightPair, WeightPair]:
    """Bring quantised weights into the order the kernel reads, and mark them as being in it.

    Args:
        l1_weights: ``w13`` float8_e4m3fn ``[E_local, 2I, H]``, gate rows first, then up rows, and its scales float32
            ``[E_local, 2I / 128, H / 128]``; or one expert, without the first dimension.
        l2_weights: ``w2`` float8_e4m3fn ``[E_local, H, I]`` and its scales float32 ``[E_local, H / 128, I / 128]``.
        inplace: Permute the codes where they are and return them, with a few matrices of one expert as scratch.
        experts: Only these local experts; the others keep their order.
        l1, l2: The old names of the first two.

    Returns:
        Both pairs with codes of the same shape, in the kernel's order, and the scales that were given. Codes that are
        not in place start at a multiple of 16 bytes, as the kernel needs it; scales are copied where their rows do not
        follow each other or they do not start at a multiple of 4.

    Raises:
        ConfigError: A dtype, shape or expert number is not supported, an expert is transformed already, or codes that
            are to be permuted in place share memory. Nothing was written.
    """
    l1_weights, l2_weights = by_old_names(l1_weights, l2_weights, l1, l2)
    return _apply(_FORTH, l1_weights, l2_weights, inplace, experts)


def inverse_transform_weights_for_mega_moe_sm90(
    l1_weights: WeightPair | None = None,
    l2_weights: WeightPair | None = None,
    *,
    inplace: bool = False,
    experts: Iterable[int] | None = None,
    l1: WeightPair | None = None,
    l2: WeightPair | None = None,
) -> tuple[WeightPair, WeightPair]:
    """Undo `transform_weights_for_mega_moe_sm90`, of weights that are marked.

    Args:
        l1_weights: as that function returns it: codes float8_e4m3fn ``[E_local, 2I, H]`` and scales float32
            ``[E_local, 2I / 128, H / 128]``; or one expert, without the first dimension.
        l2_weights: codes float8_e4m3fn ``[E_local, H, I]`` and scales float32 ``[E_local, H / 128, I / 128]``.
        inplace: Permute the codes where they are and return them, with a few matrices of one expert as scratch.
        experts: Only these local experts; the others keep their order.
        l1, l2: The old names of the first two.

    Returns:
        `l1_weights` with gate rows first, then up rows, and `l2_weights`, both with rows of consecutive bytes.

    Raises:
        ConfigError: A dtype, shape or expert number is not supported, or the weights are not marked as transformed.
    """
    l1_weights, l2_weights = by_old_names(l1_weights, l2_weights, l1, l2)
    return _apply(_BACK, l1_weights, l2_weights, inplace, experts)


def mark_transformed(
    l1_weights: WeightPair,
    l2_weights: WeightPair,
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
    check_pairs(l1_weights, l2_weights)
    check_flag("transformed", transformed)
    chosen = _chosen(experts, l1_weights[0])
    if metadata is not None:
        _marks.check_metadata(metadata)
    for name, (codes, _) in (("l1", l1_weights), ("l2", l2_weights)):
        _require_dense(name, codes)
        where = spans(codes)
        _marks.mark(codes, [where[e] for e in chosen], f"{LAYOUT}/{name}" if transformed else None)


def is_transformed(l1_weights: WeightPair, l2_weights: WeightPair) -> bool:
    """Whether all experts' weights are marked as being in the order this version's kernels read.

    Args:
        l1_weights, l2_weights: codes and scales, shaped as `transform_weights_for_mega_moe_sm90` takes them.

    Returns:
        False too where some experts are and others are not.

    Raises:
        ConfigError: these are no weights.
    """
    check_pairs(l1_weights, l2_weights)
    try:
        _require_order(l1_weights, l2_weights, _chosen(None, l1_weights[0]), plain=False)
    except ConfigError:
        return False
    return True


def weights_metadata(l1_weights: WeightPair, l2_weights: WeightPair) -> dict[str, str]:
    """What to write into a file beside transformed weights (safetensors' `metadata`), for `mark_transformed` to read.

    Args:
        l1_weights, l2_weights: as `transform_weights_for_mega_moe_sm90` gave them.

    Returns:
        One entry: the name of the order they are in.

    Raises:
        ConfigError: they are not marked as transformed.
    """
    check_pairs(l1_weights, l2_weights)
    _require_order(l1_weights, l2_weights, _chosen(None, l1_weights[0]), plain=False)
    return {METADATA_KEY: LAYOUT}
