"""Exactness: binades decide what becomes of MXFP4 values, and decoders written bit by bit check it."""

from __future__ import annotations

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.binades import E4M3, E5M2, NORMAL, Target, bounds, power_of_two
from megamoe_jit._layer.from_mxfp4 import fp8_from_mxfp4, mxfp4_spread
from megamoe_jit._spec.formats import FP8, FP8_E5M2, MXFP4
from tests.unit.layer.test_mxfp4 import draw

transform, inverse = mm.transform_weights_for_mega_moe_sm90, mm.inverse_transform_weights_for_mega_moe_sm90
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
ALL_CODES = torch.arange(16, dtype=torch.int64).to(torch.uint8)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes one by one ``[rows, depth]``."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two to a byte, low nibble first."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def values(codes: torch.Tensor, e8m0: torch.Tensor) -> torch.Tensor:
    """By definition, float64 ``[rows, depth]``."""
    each = nibbles(codes).long()
    powers = torch.pow(2.0, e8m0.double() - 127).repeat_interleave(32, -1)
    return VALUES[each & 7] * torch.where(each > 7, -1.0, 1.0).double() * powers


def e5m2(byte: torch.Tensor) -> torch.Tensor:
    """The number of a byte, float64: one sign, five bits of exponent, two of mantissa; not its infinities and NaN."""
    byte = byte.long()
    exponent, mantissa = byte >> 2 & 31, byte & 3
    assert bool((exponent < 31).all())
    fraction = torch.where(exponent > 0, 1 + mantissa / 4.0, mantissa / 4.0).double()
    sign = torch.where(byte > 127, -1.0, 1.0).double()
    return sign * fraction * torch.pow(2.0, exponent.clamp(min=1).double() - 15)


def expanded(exponents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The bytes that the kernel makes: two multiplications give a table of eight, of which a magnitude selects one."""
    b = exponents.long().repeat_interleave(32, -1)
    low = (b * 0x04040400 + 0x3E3C3800 - 16 * 0x04040400) & 0xFFFFFFFF
    high = (b * 0x04040404 + 0x46444240 - 16 * 0x04040404) & 0xFFFFFFFF
    each = nibbles(codes).long()
    return (low | high << 32) >> 8 * (each & 7) & 255 | (each & 8) << 4


def kernel_values(matrix: tuple[torch.Tensor, ...], gated: bool) -> torch.Tensor:
    """What a kernel multiplies with, of one transformed matrix, in the plain order."""
    codes, exponents, scales = matrix
    codes, exponents = MXFP4.unpack(codes, gated), MXFP4.unpack_exponents(exponents, gated)
    blocks = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return e5m2(expanded(exponents, codes)) * blocks


def layer_of(codes: torch.Tensor, e8m0: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Plain weights of one expert whose second matrix is this one ``[128, depth]``; the first is of zeros."""
    rows, depth = 4 * codes.shape[1], codes.shape[0]
    zeros = torch.zeros(rows, depth // 2, dtype=torch.uint8), torch.zeros(rows, depth // 32, dtype=torch.uint8)
    return zeros, (codes, e8m0)


def drawn(rows: int, depth: int, spread: int, seed: int = 0, least: int = 110) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes, and exponents that differ by less than `spread`."""
    return draw(rows, depth // 2, seed=seed), draw(rows, depth // 32, top=spread, seed=seed + 1) + least


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def test_every_code_with_every_exponent_is_exact():
    """A block for each exponent, which all of its groups have."""
    codes = packed(ALL_CODES.repeat(128, 8 * 255))
    e8m0 = torch.arange(255, dtype=torch.int32).to(torch.uint8).repeat_interleave(4).repeat(128, 1)
    l1, l2 = transform(*layer_of(codes, e8m0))
    assert same_numbers(kernel_values(l2, False), values(codes, e8m0))
    back = inverse(l1, l2)[1]
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1].view(torch.uint8), e8m0)
    assert torch.equal(l2[2][0, 120:136].log2(), torch.zeros(16)), "most scales of real weights are 1"
    assert mxfp4_spread(codes, e8m0).exact == {"mxfp4": 255, "e4m3": 255, "e5m2": 255}


def test_blocks_of_the_same_rows_share_a_scale_if_they_can():
    """Each block alone would have another one. In the last rows there is none for all."""
    codes, e8m0 = drawn(256, 512, 4, least=90)
    e8m0 += torch.tensor([0, 7, 3, 5], dtype=torch.uint8).repeat_interleave(4)
    e8m0[128:, :4] -= 60
    shared = bounds(codes, e8m0, NORMAL).chosen
    parts = zip(codes.split(64, 1), e8m0.split(4, 1), strict=True)
    alone = torch.cat([bounds(*each, NORMAL).chosen for each in parts], 1)
    assert len(alone[0].unique()) == 4
    assert len(shared[0].unique()) == 1
    assert torch.equal(shared[1], alone[1])


@pytest.mark.parametrize("spread", [1, 9, 27])
@pytest.mark.parametrize("gated", [False, True])
def test_groups_of_a_block_may_differ(spread, gated):
    l1, l2 = drawn(256, 256, spread), drawn(256, 128, spread, seed=5)
    made = transform(l1, l2)
    chosen, given = (made[0], l1) if gated else (made[1], l2)
    assert same_numbers(kernel_values(chosen, gated), values(*given))
    assert [t.dtype for t in chosen] == [torch.uint8, torch.uint8, torch.float32]
    for plain, back in zip((l1, l2), inverse(*made), strict=True):
        assert all(torch.equal(a, b.view(torch.uint8)) for a, b in zip(plain, back, strict=True))


def exact_by_trial(codes: torch.Tensor, e8m0: torch.Tensor, target: Target) -> bool:
    """Whether some scale makes each value of a block one of the target's numbers, found by trying all."""
    dtype = torch.float8_e4m3fn if target is E4M3 else torch.float8_e5m2
    wanted = values(codes, e8m0)
    for s in range(-170, 171):
        ratio = (wanted * 2.0**-s).abs()
        if float(ratio.max()) > float(torch.finfo(dtype).max) or float(ratio.max()) > 1.5 * 2.0**target.top:
            continue
        kept = torch.equal(ratio.float().to(dtype).double(), ratio)
        if kept and (target.subnormal or bool(((ratio == 0) | (ratio >= 2.0**target.least)).all())):
            return True
    return False


@pytest.mark.parametrize("target", [NORMAL, E4M3, E5M2], ids=lambda target: target.name)
def test_bounds_are_those_that_trials_find(target):
    """Two groups, with a few codes each, at every distance around the limit."""
    gen, found = torch.Generator().manual_seed(7), []
    for distance in range(target.binades - 6, target.binades + 5):
        for _ in range(6):
            codes = torch.zeros(128, 64, dtype=torch.uint8)
            for row in (0, 5):
                few = torch.randint(1, 8, (2,), generator=gen, dtype=torch.int64).to(torch.uint8)
                codes[row, :2] = few | (few.flip(0) | 8) << 4
            e8m0 = torch.full((128, 4), 200, dtype=torch.uint8)  # of zeros, which matter nowhere
            e8m0[0, 0], e8m0[5, 0] = 100 + distance, 100
            exact = bool(bounds(codes, e8m0, target).exact)
            assert exact == exact_by_trial(codes[[0, 5], :16], e8m0[[0, 5], :1], target)
            found.append(exact)
    assert 10 < sum(found) < len(found) - 10


@pytest.mark.parametrize(("distance", "exact"), [(26, True), (27, False), (28, False), (29, False), (30, False)])
def test_blocks_with_all_codes_may_span_27_exponents(distance, exact):
    codes, e8m0 = draw(128, 64), torch.full((128, 4), 100, dtype=torch.uint8)
    codes[0, :16] = codes[77, 32:48] = packed(ALL_CODES.repeat(2))
    e8m0[0, 0] = 100 + distance
    assert mxfp4_spread(codes, e8m0).binades == distance + 4
    if exact:
        assert same_numbers(kernel_values(transform(*layer_of(codes, e8m0))[1], False), values(codes, e8m0))
        return
    with pytest.raises(ConfigError, match="l2 weights: 1 of 1 blocks") as caught:
        transform(*layer_of(codes, e8m0))
    for part in ("expert 0, rows 0 to 127, columns 0 to 127", f"span {distance + 4} binades (2^-28 to", "allowed: 30"):
        assert part in str(caught.value)
    assert "rounding='nearest'" in str(caught.value)
    made = kernel_values(transform(*layer_of(codes, e8m0), rounding="nearest")[1], False)
    error = (made - values(codes, e8m0)).abs()
    assert 0 < float(error.max()) <= 2.0**NORMAL.rounding_error * float(values(codes, e8m0).abs().max())
    assert torch.equal(error[0, :32], torch.zeros(32).double()), "the largest are as they were"


def test_rounding_changes_nothing_that_is_exact():
    """Nor groups of an inexact block that the kernel can have, whatever their exponent."""
    l1, l2 = drawn(256, 128, 20), drawn(128, 128, 9)
    for plain, made in zip(transform(l1, l2), transform(l1, l2, rounding="nearest"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
    codes, e8m0 = torch.zeros(128, 64, dtype=torch.uint8), torch.full((128, 4), 127, dtype=torch.uint8)
    codes[0, 0], e8m0[0, 0] = 0x07, 150  # 6 * 2^23: s is 10
    codes[1, 0], e8m0[1, 0] = 0x33, 123  # 1.5 * 2^-4, the least binade: as a half of 3 it would be rounded
    codes[2, 0], e8m0[2, 0] = 0x51, 121  # 2^-7 and 3 * 2^-6: too small
    made = inverse(*transform(*layer_of(codes, e8m0), rounding="nearest"))[1]
    assert torch.equal(made[0][:2], codes[:2])
    assert torch.equal(made[1].view(torch.uint8)[:2], e8m0[:2])
    assert values(made[0], made[1].view(torch.uint8))[2, :2].tolist() == [0.0, 2.0**-4], "to nearest, ties to even"


@pytest.mark.parametrize("times", range(6))
def test_rounding_is_to_nearest_with_ties_to_even(times):
    codes, e8m0 = torch.zeros(128, 64, dtype=torch.uint8), torch.full((128, 4), 127, dtype=torch.uint8)
    codes[0, 0], e8m0[0, 0] = 0x07, 127 + 13  # s is 0 where nothing bounds it from above
    codes[1, :16], e8m0[1, 0] = packed(ALL_CODES.repeat(2)), 127 - 13 - times
    made = kernel_values(transform(*layer_of(codes, e8m0), rounding="nearest")[1], False)[1, :16] * 2.0**13
    signed = torch.cat((VALUES, -VALUES))
    for value, got in zip((signed * 2.0**-times).tolist(), made.tolist(), strict=True):
        distances = (VALUES - abs(value)).abs()
        nearest = [int(i) for i in (distances == distances.min()).nonzero()]
        even = nearest[0] if len(nearest) == 1 else next(i for i in nearest if i % 2 == 0)
        assert abs(got) == float(VALUES[even])
        assert got == 0 or (got > 0) == (value > 0)


def test_groups_of_zeros_keep_their_signs_and_exponents():
    codes, e8m0 = drawn(128, 256, 9)
    codes[::3] = 0x80
    e8m0[::3] = draw(43, 8, top=255, seed=9)
    made = transform(*layer_of(codes, e8m0))
    assert same_numbers(kernel_values(made[1], False), values(codes, e8m0))
    back = inverse(*made)[1]
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1].view(torch.uint8), e8m0)


def test_nan_is_refused_and_nothing_was_written():
    l1, l2 = drawn(256, 128, 9), drawn(128, 128, 9)
    l1, l2 = (tuple(torch.stack((each, each)) for each in pair) for pair in (l1, l2))
    l2[1][1, 7, 2] = 255
    before = [each.clone() for each in (*l1, *l2)]
    with pytest.raises(ConfigError, match=r"l2 expert 1 exponents\[7, 2\] is 255, which is NaN; allowed: 0 to 254"):
        transform(l1, l2, inplace=True)
    l2[1][1, 7, 2] = before[3][1, 7, 2] = 90
    l2[0][1, 7, 32:48] = before[2][1, 7, 32:48] = 0x11
    l2[1][1, 8] = before[3][1, 8] = 150
    with pytest.raises(ConfigError, match="expert 1, rows 0 to 127, columns 0 to 127, whose values span") as caught:
        transform(l1, l2, inplace=True)
    assert "fp8_from_mxfp4" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, (*l1, *l2), strict=True))
    with pytest.raises(ConfigError, match="is 255, which is NaN"):
        mxfp4_spread(l2[0], torch.full_like(l2[1], 255))
    with pytest.raises(ConfigError, match="is 255, which is NaN"):
        fp8_from_mxfp4(l2[0], torch.full_like(l2[1], 255))


# -- FP8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float8_e4m3fn, 15), (torch.float8_e5m2, 29)])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_fp8_has_the_same_values(dtype, spread, lead):
    codes, e8m0 = draw(*lead, 256, 64), draw(*lead, 256, 4, top=spread, seed=1) + 105
    made, scales = fp8_from_mxfp4(codes, e8m0, dtype=dtype)
    assert (made.dtype, made.shape, scales.shape) == (dtype, (*lead, 256, 128), (*lead, 2, 1))
    assert same_numbers(mm.dequantize_weights(made, scales), MXFP4.dequantize(codes, e8m0))
    stored = FP8 if dtype is torch.float8_e4m3fn else FP8_E5M2
    assert torch.equal(stored.dequantize(made, scales).double(), values(codes, e8m0))
    assert torch.equal(scales.log2().round().exp2(), scales)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_of_every_code_with_every_exponent(dtype):
    codes = packed(ALL_CODES.repeat(128, 8 * 255))
    e8m0 = torch.arange(255, dtype=torch.int32).to(torch.uint8).repeat_interleave(4).repeat(128, 1)
    made, scales = fp8_from_mxfp4(codes, e8m0, dtype=dtype)
    blocks = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert same_numbers(made.double() * blocks, values(codes, e8m0))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float8_e4m3fn, 18), (torch.float8_e5m2, 32)])
def test_fp8_that_cannot_be_exact_is_refused_or_rounded(dtype, limit):
    codes, e8m0 = draw(2, 128, 64), torch.full((2, 128, 4), 100, dtype=torch.uint8)
    codes[1, 0, :16] = codes[1, 77, 32:48] = packed(ALL_CODES.repeat(2))
    e8m0[1, 0, 0] = 100 + limit - 3
    with pytest.raises(
        ConfigError, match=rf"weights: 1 of 2 blocks .* expert 1, .* span {limit + 1} .* allowed: {limit}"
    ):
        fp8_from_mxfp4(codes, e8m0, dtype=dtype)
    made, scales = fp8_from_mxfp4(codes, e8m0, dtype=dtype, rounding="nearest")
    wanted, target = values(codes[1], e8m0[1]), E4M3 if dtype is torch.float8_e4m3fn else E5M2
    error = (made[1].double() * scales[1].double() - wanted).abs()
    assert 0 < float(error.max()) <= 2.0**target.rounding_error * float(wanted.abs().max())
    assert torch.equal(made[0].double() * scales[0].double(), values(codes[0], e8m0[0]))
    with pytest.raises(ConfigError, match="rounding = 'up' is not supported; allowed: None, or 'nearest'"):
        fp8_from_mxfp4(codes, e8m0, rounding="up")


def test_fp8_comes_from_all_types_that_codes_have():
    codes, e8m0 = draw(128, 64), draw(128, 4, top=9) + 110
    wanted = fp8_from_mxfp4(codes, e8m0)
    for form in (torch.int8, torch.float4_e2m1fn_x2):
        made = fp8_from_mxfp4(codes.view(form), e8m0.view(torch.float8_e8m0fnu))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(made, wanted, strict=True))
    every_other = torch.stack((codes, codes), -1)[..., 0], torch.stack((e8m0, e8m0), -1)[..., 0]
    made = fp8_from_mxfp4(*every_other)
    assert torch.equal(made[0].view(torch.uint8), wanted[0].view(torch.uint8)), "whatever the strides"
    none = fp8_from_mxfp4(codes[None][:0], e8m0[None][:0])
    assert [tuple(each.shape) for each in none] == [(0, 128, 128), (0, 1, 1)]


def test_both_formats_of_one_source_have_the_same_values():
    l1, l2 = drawn(256, 256, 14), drawn(256, 128, 14, seed=4)
    made = transform(l1, l2)
    for matrix, given, gated in ((made[0], l1, True), (made[1], l2, False)):
        as_fp8 = mm.dequantize_weights(*fp8_from_mxfp4(*given))
        assert same_numbers(as_fp8.double(), kernel_values(matrix, gated))


def test_the_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int16)
    assert torch.equal(power_of_two(exponents).double(), torch.pow(2.0, exponents.double()))


def test_spread_says_how_many_blocks_are_exact():
    codes, e8m0 = draw(2, 128, 128), draw(2, 128, 8, top=9) + 110
    codes[1, 3, :16], e8m0[1, 3, 0] = 0x77, 140
    codes[1, 9, :16], e8m0[1, 9, 0] = 0x11, 112
    assert mxfp4_spread(codes, e8m0) == type(mxfp4_spread(codes, e8m0))(4, 34, {"mxfp4": 3, "e4m3": 3, "e5m2": 3})
    zeros = torch.zeros_like(codes)
    assert mxfp4_spread(zeros, e8m0) == type(mxfp4_spread(codes, e8m0))(
        4, 0, dict.fromkeys(("mxfp4", "e4m3", "e5m2"), 4)
    )
