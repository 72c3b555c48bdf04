"""Which power of two can be the scale of a block of MXFP4 weights, so that every value stays what it is.

A weight is ``v * 2 ** e``, v of e2m1 and e of its group of 32. What reads it multiplies codes of eight bits with one
scale ``2 ** s`` for 128 x 128 of them, so every ``v * 2 ** (e - s)`` must be a number of those codes. As each v has two
significant bits, and each code at least as many, binades decide that: that of a block's largest magnitude bounds s from
below, that of its smallest from above. Where the bounds leave a choice, s is the same in all blocks of the same 128
rows, which spares the kernel multiplications, and nearest to 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import BLOCK, MXFP4

E8M0_BIAS = 127
GROUP_BYTES = MXFP4.code_bytes(1, MXFP4.group)  #: of codes
_NEVER = 1000  #: what a group of zeros asks for bounds nothing


class Target(NamedTuple):
    """The numbers that values become, relative to the scale of their block."""

    name: str  #: for people
    top: int  #: binade of the largest power of two; one and a half times it is a number as well
    least: int  #: binade of the smallest: of the lowest set bit with subnormal numbers, else of the smallest number
    subnormal: bool  #: whether they are used

    @property
    def binades(self) -> int:
        """That values of a block may span."""
        return self.top - self.least + 1

    @property
    def rounding_error(self) -> int:
        """Binade, relative to that of a block's largest value, of the most that rounding changes a value by."""
        return self.least - 1 - self.top


E4M3 = Target("e4m3", 8, -9, True)
E5M2 = Target("e5m2", 15, -16, True)
NORMAL = Target("e5m2 without subnormal numbers", 15, -14, False)  #: what the kernel expands packed codes to


class Bounds(NamedTuple):
    """The s of each block that are exact, int16 ``[rows / 128, depth / 128]``: none where `least` is above `most`."""

    least: torch.Tensor
    most: torch.Tensor

    def of(self, matrix: int) -> Bounds:
        """Those of one of several matrices."""
        return Bounds(*(each[matrix] for each in self))

    @property
    def exact(self) -> torch.Tensor:
        """Where there is one."""
        return self.least <= self.most

    @property
    def chosen(self) -> torch.Tensor:
        """Of those that are exact for all blocks of the same rows the one nearest to 0; if there is none, each block's
        nearest to 0. Where none is exact the least, which holds the largest values.
        """
        least, most = self.least.amax(-1, keepdim=True), self.most.amin(-1, keepdim=True)
        common = torch.maximum(least, most.clamp(max=0)) * (least <= most)
        return torch.maximum(self.least, torch.minimum(self.most, common))


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """``2 ** exponent`` as float32, of integers from -126 to 127."""
    return (exponents.to(torch.int32) + 127 << 23).view(torch.float32)


def _fold(pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`pick` of all elements of the last dimension, whose length is a power of two."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = pick(x[..., :half], x[..., half:])
    return x.squeeze(-1)


def binades(codes: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each group ``[rows, groups]``: binade of its largest value, that of its smallest, whether it has any.

    That of the smallest is of its lowest set bit where the target has subnormal numbers.
    """
    groups = codes.reshape(codes.shape[0], -1, GROUP_BYTES)
    there = _fold(torch.bitwise_or, (1 << (groups & 7)) | (1 << (groups >> 4 & 7))).int()  # a bit for each magnitude
    tables = _by_magnitudes(target)
    largest, smallest = (torch.tensor(table, dtype=torch.int16, device=codes.device) for table in tables)
    return largest[there], smallest[there], there > 1


@functools.cache
def _by_magnitudes(target: Target) -> tuple[list[int], list[int]]:
    """By the magnitudes that a group has, as bits of a byte: the binades that bound it. That of zeros matters not."""
    floor = (0, -1, 0, 0, 1, 1, 2, 2)  # of 0, 0.5, 1, 1.5, 2, 3, 4 and 6
    bit = (0, -1, 0, -1, 1, 0, 2, 1)
    sets = [[m for m in range(1, 8) if mask >> m & 1] or [0] for mask in range(256)]
    lowest = bit if target.subnormal else floor
    return [max(floor[m] for m in each) for each in sets], [min(lowest[m] for m in each) for each in sets]


def bounds(codes: torch.Tensor, e8m0: torch.Tensor, target: Target) -> Bounds:
    """What s may be in each block of a matrix.

    Args:
        codes: uint8 ``[rows, depth / 2]``.
        e8m0: uint8 ``[rows, depth / 32]``.
        target: what the values become.
    """
    largest, smallest, any_value = binades(codes, target)
    exponents = e8m0.to(torch.int16) - E8M0_BIAS
    blocks = (codes.shape[0] // BLOCK, BLOCK, -1, BLOCK // MXFP4.group)
    least = torch.where(any_value, exponents + largest - target.top, -_NEVER)
    most = torch.where(any_value, exponents + smallest - target.least, _NEVER)
    return Bounds(least.reshape(blocks).amax((1, 3)), most.reshape(blocks).amin((1, 3)))


def refuse_inexact(name: str, found: Bounds, target: Target, next_step: str, experts: Sequence[int] | None) -> None:
    """Raise `ConfigError` unless all blocks are exact.

    Args:
        name: of the weights.
        found: of some matrices, int16 ``[matrices, rows / 128, depth / 128]``.
        target: what it is of.
        next_step: what else can be done, beside rounding.
        experts: whose matrices they are; None for one that is no expert's.
    """
    inexact = ~found.exact
    if not bool(inexact.any()):
        return
    matrix, row, column = (int(at) for at in inexact.nonzero()[0])
    least, most = (int(each[matrix, row, column]) for each in found)
    highest, lowest = least + target.top, most + target.least
    where = f"rows {row * BLOCK} to {row * BLOCK + BLOCK - 1}, columns {column * BLOCK} to {column * BLOCK + BLOCK - 1}"
    where = where if experts is None else f"expert {experts[matrix]}, {where}"
    raise ConfigError(
        f"{name}: {int(inexact.sum())} of {inexact.numel()} blocks of 128 x 128 are not exact in {target.name}, first "
        f"{where}, whose values span {highest - lowest + 1} binades (2^{lowest} to 2^{highest}); allowed: "
        f"{target.binades}. {next_step}rounding='nearest' rounds the smallest values of such blocks, by at most "
        f"2^{target.rounding_error} of the block's largest"
    )
