"""MXFP4 weights as other codes: with exponents that fit what the kernel makes of them, and as FP8.

Tables by exponent are looked up for a byte at a time, two codes, so the work is little more than reading and writing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megamoe_jit._layer.binades import (
    E4M3,
    E5M2,
    E8M0_BIAS,
    GROUP_BYTES,
    NORMAL,
    Bounds,
    Target,
    binades,
    bounds,
    power_of_two,
    refuse_inexact,
)
from megamoe_jit._layer.given_weights import as_bytes, check_plain_mxfp4
from megamoe_jit._layer.mxfp4 import byte_values, to_groups
from megamoe_jit._spec.checks import check
from megamoe_jit._spec.formats import MXFP4

_TARGETS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
MOST_HALVINGS = 5  #: then all of e2m1 is rounded to zero


def check_rounding(rounding: str | None) -> bool:
    """Whether values may be rounded; raises `ConfigError` unless it says so or nothing."""
    known = rounding is None or (isinstance(rounding, str) and rounding == "nearest")
    check(known, "rounding", rounding, "None, or 'nearest'")
    return rounding is not None


def _halved(device: torch.device) -> torch.Tensor:
    """By how often they are halved, and byte: the two codes rounded to nearest, ties to even; uint8."""
    values = byte_values(device)
    edges, made = torch.tensor([2.5, 3.5, 5.0], dtype=torch.float32, device=device), []
    for times in range(MOST_HALVINGS + 1):
        wanted = (values * 0.5**times).abs()
        # in e2m1 half a value has at most one bit too many: below 1 in steps of a half
        small = torch.where(wanted < 2, (wanted * 2).round().clamp(max=4), 0).to(torch.uint8)
        large = torch.bucketize(wanted, edges).to(torch.uint8) + 4
        code = torch.where(wanted < 2, small, large) | (torch.signbit(values).to(torch.uint8) << 3)
        made.append(code[:, 0] | code[:, 1] << 4)
    return torch.cat(made)


def round_groups(codes: torch.Tensor, e8m0: torch.Tensor, found: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix whose blocks are all exact, and in which those that were are as they were.

    Groups that are too small for their block get larger exponents, and their codes are halved as often and rounded.

    Args:
        codes: uint8 ``[rows, depth / 2]``.
        e8m0: uint8 ``[rows, depth / 32]``.
        found: bounds of its blocks, for `NORMAL`.

    Returns:
        Tensors like the first two. Values change by at most ``2 ** (s - 15)``, s the block's chosen exponent.
    """
    _, smallest, any_value = binades(codes, NORMAL)
    exponents, s = e8m0.to(torch.int16) - E8M0_BIAS, to_groups(found.chosen)
    too_small = any_value & (exponents + smallest - NORMAL.least < s)
    wanted = torch.where(too_small, s + (NORMAL.least + 1), exponents)  # for which one half is in the least binade
    times = (wanted - exponents).clamp(max=MOST_HALVINGS).to(torch.int32)
    index = codes.reshape(*e8m0.shape, GROUP_BYTES) + (times * 256).unsqueeze(-1)
    rounded = _halved(codes.device).index_select(0, index.view(-1)).view(codes.shape)
    return rounded, (wanted + E8M0_BIAS).to(torch.uint8)


def _recoded(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, int]:
    """By exponent and byte: two FP8 codes, int16; and the least exponent, at which all values are rounded to zero."""
    target = _TARGETS[dtype]
    least = target.least - 4
    values = byte_values(device)
    factors = power_of_two(torch.arange(least, target.top + 2, dtype=torch.int32, device=device))
    made = (values * factors[:, None, None]).clamp(-(2.0**target.top) * 1.5, 2.0**target.top * 1.5).to(dtype)
    return made.view(torch.int16).reshape(-1), least


def _recode(
    codes: torch.Tensor, e8m0: torch.Tensor, s: torch.Tensor, out: torch.Tensor, table: torch.Tensor, least: int
) -> None:
    """Write a matrix's values relative to the scales ``2 ** s`` of its blocks into `out`, by a table of `_recoded`."""
    d = e8m0.to(torch.int16) - to_groups(s + E8M0_BIAS) - least
    rows = d.clamp(0, len(table) // 256 - 1).to(torch.int32) * 256
    index = codes.reshape(*e8m0.shape, GROUP_BYTES) + rows.unsqueeze(-1)
    out.view(torch.int16).copy_(table.index_select(0, index.view(-1)).view(codes.shape))


@torch.no_grad()
def fp8_from_mxfp4(
    codes: torch.Tensor, e8m0: torch.Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, rounding: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 weights as FP8 weights with the same values, for who has the memory: twice as much.

    Args:
        codes: two to a byte, low nibble first: uint8, int8 or float4_e2m1fn_x2 ``[..., N, K / 2]``, N and K multiples
            of 128; on any device.
        e8m0: exponents of 32 along K: float8_e8m0fnu or uint8 ``[..., N, K / 32]``.
        dtype: float8_e4m3fn, whose values may span 18 binades in a block of 128 x 128, or float8_e5m2, with 32.
        rounding: "nearest" rounds the smallest values of blocks that span more; None refuses them.

    Returns:
        Codes ``[..., N, K]`` in `dtype`, and scales float32 ``[..., N / 128, K / 128]``, powers of two.

    Raises:
        ConfigError: a dtype, shape or option is not supported, an exponent is NaN (255), or a block is not exact (says
            which one).
    """
    codes, e8m0 = check_plain_mxfp4(codes, e8m0)
    check(isinstance(dtype, torch.dtype) and dtype in _TARGETS, "dtype", dtype, "float8_e4m3fn or float8_e5m2")
    rounded, target = check_rounding(rounding), _TARGETS[dtype]
    *lead, rows, stored = codes.shape
    made = torch.empty((*lead, rows, 2 * stored), dtype=dtype, device=codes.device)
    scales = torch.empty((*lead, *MXFP4.scale_shape(rows, 2 * stored)), dtype=torch.float32, device=codes.device)
    matrices = _matrices(codes, e8m0)
    if not matrices:
        return made, scales
    found = block_bounds(matrices, target)
    if not rounded:
        wider = "dtype=torch.float8_e5m2 has a wider range; " if dtype is torch.float8_e4m3fn else ""
        refuse_inexact("weights", found, target, wider, None if not lead else range(len(matrices)))
    table = _recoded(dtype, codes.device)
    for matrix, s, out in zip(matrices, found.chosen, made.view(-1, rows, 2 * stored), strict=True):
        _recode(*matrix, s, out, *table)
    return made, scales.copy_(power_of_two(found.chosen).view(scales.shape))


def block_bounds(matrices: Iterable[tuple[torch.Tensor, torch.Tensor]], target: Target) -> Bounds:
    """`bounds` of codes and exponents of some matrices, int16 ``[matrices, N / 128, K / 128]``.

    One matrix at a time, so that scratch stays small.
    """
    found = [bounds(as_bytes(codes), as_bytes(e8m0), target) for codes, e8m0 in matrices]
    return Bounds(torch.stack([each.least for each in found]), torch.stack([each.most for each in found]))


def _matrices(codes: torch.Tensor, e8m0: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of codes and exponents of any number of dimensions, those of each matrix."""
    flat = (each.reshape(-1, *each.shape[-2:]) for each in (codes, e8m0))
    return list(zip(*flat, strict=True))


@dataclass(frozen=True, slots=True)
class Mxfp4Spread:
    """How far apart the values of each block of 128 x 128 are, and what holds them exactly.

    Attributes:
        blocks: of all matrices.
        binades: that the widest block's values span.
        exact: how many blocks are exact, by what the weights become: "mxfp4" as they are, "e4m3" or "e5m2" as FP8.
    """

    blocks: int
    binades: int
    exact: dict[str, int]


@torch.no_grad()
def mxfp4_spread(codes: torch.Tensor, e8m0: torch.Tensor) -> Mxfp4Spread:
    """Whether MXFP4 weights can be used as they are, and as FP8.

    Args:
        codes, e8m0: as `fp8_from_mxfp4` takes them.

    Returns:
        What all blocks of all matrices have in common: how many, how wide the widest is, and how many are exact.

    Raises:
        ConfigError: a dtype or shape is not supported, or an exponent is NaN (255).
    """
    codes, e8m0 = check_plain_mxfp4(codes, e8m0)
    matrices, targets = _matrices(codes, e8m0), {"mxfp4": NORMAL, "e4m3": E4M3, "e5m2": E5M2}
    if not matrices:
        return Mxfp4Spread(0, 0, dict.fromkeys(targets, 0))
    found = {name: block_bounds(matrices, target) for name, target in targets.items()}
    least, most = found["mxfp4"]
    widest = int((least - most).amax()) + NORMAL.binades
    return Mxfp4Spread(least.numel(), max(widest, 0), {name: int(each.exact.sum()) for name, each in found.items()})
