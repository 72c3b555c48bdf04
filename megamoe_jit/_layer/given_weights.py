"""Weights as callers give them: the format that they are in, by their dtypes, and whether the tensors fit it.

Before the transform a matrix is a pair: codes and scales, or MXFP4 codes and e8m0 exponents. In the kernel's order a
format has the tensors of `WeightFormat.parts`, so MXFP4 has three, the second of which is no e8m0 then.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._spec import BLOCK, FP8, FP8_E5M2, MXFP4, WeightFormat
from megamoe_jit._text import shown

WeightTensors: TypeAlias = tuple[torch.Tensor, ...]  #: of one matrix of each expert, codes first

PACKED_TYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)  #: of codes that come two to a byte
E8M0_TYPES = (torch.float8_e8m0fnu, torch.uint8)
#: By the dtype of codes.
FORMAT_BY_TYPE = {torch.float8_e4m3fn: FP8, torch.float8_e5m2: FP8_E5M2, **dict.fromkeys(PACKED_TYPES, MXFP4)}
_CODES = "float8_e4m3fn or float8_e5m2 with float32 scales, or uint8 with e8m0 exponents (MXFP4)"


def e8m0_of(scales: torch.Tensor) -> torch.Tensor:
    """Exponents as bytes of scales that are powers of two, in any dtype; e8m0 already are these themselves.

    Raises:
        ConfigError: one is none.
    """
    if scales.dtype in E8M0_TYPES:
        return scales.view(torch.uint8)
    found = scales.to(torch.float8_e8m0fnu)
    if not torch.equal(found.to(torch.float32), scales.to(torch.float32)):
        raise ConfigError("scales of MXFP4 are not all powers of two; allowed: 2 ** -127 to 2 ** 127, as e8m0 has them")
    return found.view(torch.uint8)


def require_tensors(name: str, given: object, most: int = 3) -> WeightTensors:
    """The tensors of a matrix; raises `ConfigError` unless they are two, or three where that can be."""
    tensors = tuple(given) if isinstance(given, tuple | list) else ()
    packed = len(tensors) > 0 and getattr(tensors[0], "dtype", None) in PACKED_TYPES
    if len(tensors) == 3 and not packed:
        most = 2
    if not 2 <= len(tensors) <= most:
        found = type(given).__name__ + (f" of {len(tensors)}" if isinstance(given, tuple | list) else "")
        more = "; of MXFP4 in the kernel's order codes, exponents and scales" if most > 2 else ""
        raise ConfigError(f"{name}: {found} given; allowed: a pair of tensors, codes and scales{more}")
    names = ("weights", "exponents", "scales") if packed else ("weights", "scales")
    for what, tensor in zip(names, tensors, strict=False):
        require_tensor(f"{name} {what}", tensor)
    return tensors


def format_of(name: str, given: WeightTensors) -> WeightFormat:
    """The format that tensors are in, by the dtype of their codes; raises `ConfigError` if there is none."""
    found = FORMAT_BY_TYPE.get(given[0].dtype)
    if found is None:
        raise ConfigError(f"{name} weights are {given[0].dtype}; allowed: {_CODES}")
    return found


def format_of_call(l1: object) -> WeightFormat:
    """The format of a call's weights, by those of the first matrix; they are checked later, once."""
    try:
        return FORMAT_BY_TYPE[l1[0].dtype]  # type: ignore[index]
    except Exception:  # costs nothing where it is a tuple of tensors
        return format_of("l1", require_tensors("l1", l1))


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8."""
    return codes if codes.dtype is torch.uint8 else codes.view(torch.uint8)


def stacked(tensor: torch.Tensor) -> torch.Tensor:
    """With a dimension of experts."""
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor


def written_parts(given: WeightTensors, weights: WeightFormat) -> list[torch.Tensor]:
    """What a transform writes, as bytes ``[experts, rows, bytes of a row]``: codes, and exponents if there are some."""
    return [stacked(as_bytes(each)) for each in (given[:2] if weights.group else given[:1])]


def written(l1: WeightTensors, l2: WeightTensors, weights: WeightFormat) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The `written_parts` of both matrices, each with its names for people: l1 or l2, and weights or exponents."""
    for name, given in (("l1", l1), ("l2", l2)):
        for what, tensor in zip(("weights", "exponents"), written_parts(given, weights), strict=False):
            yield name, what, tensor


def require_values(name: str, tensor: torch.Tensor) -> None:
    """Raise `ConfigError` where a tensor has a shape alone, as those of meta and of `FakeTensorMode`."""
    odd = "FakeTensor" if isinstance(tensor, FakeTensor) else "tensor on meta" if tensor.device.type == "meta" else ""
    if odd:
        raise ConfigError(f"{name}: a {odd} given, which holds no values; allowed: a tensor on a device with memory")


def _check_matrix(name: str, given: WeightTensors, weights: WeightFormat) -> None:
    codes, *others = given
    if codes.ndim not in (2, 3):
        raise ConfigError(f"{name} weights have shape {tuple(codes.shape)}; allowed: [experts, N, K] or one [N, K]")
    *lead, n, stored = codes.shape
    k = weights.depth_of(stored)
    if n == 0 or n % BLOCK or k == 0 or k % BLOCK:
        packed = f", which is {weights.code_bytes(1, BLOCK)} bytes of {weights.name}" if weights.bits < 8 else ""
        given_shape = f"{name} weights have shape {tuple(codes.shape)}"
        raise ConfigError(f"{given_shape}; allowed: N and K multiples of 128{packed}")
    names = [part.name for part in weights.parts(n, k) if part.name != "codes"]
    for what, tensor in zip(("weights", *names), given, strict=False):
        require_values(f"{name} {what}", tensor)
    for part, tensor in zip(weights.parts(n, k)[1:], others, strict=False):
        _check_part(f"{name} {part.name}", tensor, (*lead, *part.shape), part.dtype, weights)
        if tensor.device != codes.device:
            raise ConfigError(f"{name} {part.name} are on {tensor.device}; allowed: {codes.device}, where codes are")


def check_exponents(name: str, tensor: torch.Tensor) -> None:
    """Raise `ConfigError` unless these may be e8m0 exponents by their dtype."""
    if tensor.dtype not in E8M0_TYPES:
        besides = "weights whose scales are float32 have codes in float8_e4m3fn or float8_e5m2"
        raise ConfigError(f"{name} are {tensor.dtype}; allowed: {' or '.join(map(str, E8M0_TYPES))}; {besides}")


def _check_part(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, weights: WeightFormat
) -> None:
    exponents = dtype is torch.uint8
    if exponents:
        check_exponents(name, tensor)
    elif tensor.dtype is not dtype:
        raise ConfigError(f"{name} are {tensor.dtype}; allowed: {dtype}")
    if tuple(tensor.shape) != shape:
        block = (1, weights.group) if exponents else weights.scale_block
        one = " x ".join(map(str, block))
        raise ConfigError(f"{name} have shape {tuple(tensor.shape)}; allowed: {shape}, one per {one}")


def check_pairs(l1: WeightTensors, l2: WeightTensors, *, ordered: bool | None = None) -> WeightFormat:
    """The format of both matrices of some experts, or of one; raises unless they are that.

    Args:
        l1, l2: their tensors.
        ordered: whether they are as the kernel reads them (True) or as callers bring them (False), which matters to
            formats with exponents; None for either.
    """
    l1, l2 = require_tensors("l1", l1), require_tensors("l2", l2)
    weights, other = format_of("l1", l1), format_of("l2", l2)
    if other is not weights:
        raise ConfigError(f"l2 weights are {l2[0].dtype} ({other.name}); allowed: {weights.name}, as l1")
    for name, given in (("l1", l1), ("l2", l2)):
        count = len(weights.part_names)
        if ordered is not None and len(given) != (count if ordered else 2):
            allowed = "codes, exponents and scales, as the transform gives them" if ordered else "codes and exponents"
            raise ConfigError(f"{name}: {len(given)} tensors given; allowed: {allowed}, for {weights.name}")
        _check_matrix(name, given, weights)
    *lead, rows, stored = l1[0].shape
    hidden = weights.depth_of(stored)
    if rows % (2 * BLOCK):
        raise ConfigError(f"l1 weights have {rows} rows; allowed: 2 x intermediate, a multiple of 256")
    expected = (*lead, *weights.code_shape(hidden, rows // 2))
    if tuple(l2[0].shape) != expected:
        raise ConfigError(
            f"l2 weights have shape {tuple(l2[0].shape)}; allowed: {expected}, to fit l1 {tuple(l1[0].shape)}"
        )
    return weights


def check_plain_mxfp4(codes: torch.Tensor, e8m0: torch.Tensor) -> WeightTensors:
    """Codes and exponents as bytes, of matrices ``[..., N, K]``; raises unless that is what they are."""
    codes, e8m0 = require_tensors("weights", (codes, e8m0), 2)
    if FORMAT_BY_TYPE.get(codes.dtype) is not MXFP4:
        allowed = f"{', '.join(map(str, PACKED_TYPES))}, two codes to a byte"
        raise ConfigError(f"weights are {codes.dtype}; allowed: {allowed}")
    if codes.ndim < 2:
        raise ConfigError(f"weights have shape {tuple(codes.shape)}; allowed: [..., N, K / 2]")
    flat = [each.flatten(0, -3) if each.ndim == codes.ndim > 3 else each for each in (codes, e8m0)]
    _check_matrix("weights", tuple(flat), MXFP4)
    refuse_nan("weights", e8m0)
    return as_bytes(codes), as_bytes(e8m0)


def refuse_nan(name: str, e8m0: torch.Tensor) -> None:
    """Raise `ConfigError` if an exponent is 255, which is NaN in e8m0."""
    bad = as_bytes(e8m0) == 255
    if bool(bad.any()):
        at = [int(i) for i in bad.nonzero()[0]]
        raise ConfigError(f"{name} exponents{at} is 255, which is NaN; allowed: 0 to 254, which are 2 ** (byte - 127)")


def readable_scales(scales: torch.Tensor) -> torch.Tensor:
    """The scales as the kernel reads them, float by float: rows one after the other, at a multiple of four bytes.

    These themselves where they are so already, as a slice of experts is; otherwise a copy.
    """
    fits = scales.is_contiguous() and scales.data_ptr() % scales.itemsize == 0
    return scales if fits else scales.clone(memory_format=torch.contiguous_format)


def chosen_experts(experts: Iterable[int] | None, codes: torch.Tensor) -> list[int]:
    """The local experts that are meant, of codes ``[experts, N, K]`` or one ``[N, K]``; raises `ConfigError`."""
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


def by_old_names(
    l1_weights: WeightTensors | None,
    l2_weights: WeightTensors | None,
    l1: WeightTensors | None,
    l2: WeightTensors | None,
) -> tuple[WeightTensors, WeightTensors]:
    """Both matrices, of a caller who may have given them by the old names `l1` and `l2`.

    Raises:
        ConfigError: one is missing, or given twice.
    """
    matrices = []
    for name, new, old in (("l1", l1_weights, l1), ("l2", l2_weights, l2)):
        if new is not None and old is not None:
            raise ConfigError(f"{name}_weights and {name} were given; allowed: {name}_weights alone")
        matrices.append(require_tensors(name, new if new is not None else old))
    if l1 is not None or l2 is not None:
        new_names = "l1 and l2 are now named l1_weights and l2_weights; the old names will go"
        warnings.warn(new_names, DeprecationWarning, stacklevel=_level_of_caller())
    return matrices[0], matrices[1]


def _level_of_caller() -> int:
    """The `stacklevel` of a warning that is about whoever called the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("megamoe_jit."):
        frame, level = frame.f_back, level + 1
    return level
