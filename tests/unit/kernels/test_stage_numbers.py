"""The quantisation of the staging kernels, built here: bit for bit that of `quantize_activations`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megamoe_jit import quantize_activations
from tests import host

FORMATS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target, plain = tmp_path_factory.mktemp("quantise") / "quantise", host.SOURCES / "plain"
    return host.build(host.SOURCES / "quantise.cpp", target, "-iquote", str(plain), "-ffp-contract=off", "-Wno-unused")


def by_the_kernel(program: Path, form: str, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = groups.contiguous().view(torch.uint8).numpy().tobytes()
    out = subprocess.run([program, form], input=given, capture_output=True, check=True).stdout
    rows = torch.frombuffer(bytearray(out), dtype=torch.uint8).view(len(groups), 132)
    return rows[:, 4:], rows[:, :4].contiguous().view(torch.float32)


def assert_same(program: Path, form: str, groups: torch.Tensor) -> None:
    assert groups.dtype is FORMATS[form]
    codes, scales = by_the_kernel(program, form, groups)
    want_codes, want_scales = quantize_activations(groups)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(scales.isnan(), want_scales.isnan())
    want = want_codes.view(torch.uint8)
    nan = (want & 0x7F) == 0x7F
    assert torch.equal((codes & 0x7F) == 0x7F, nan)
    assert torch.equal(codes[~nan], want[~nan])  # signs of zero too


def all_of_16_bits(dtype: torch.dtype) -> torch.Tensor:
    """Every number that is neither infinite nor NaN, in an order of chance."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    dice = torch.Generator().manual_seed(1)
    return numbers[torch.randperm(len(numbers), generator=dice)]


@pytest.mark.parametrize("form", ["bf16", "f16"])
def test_every_number_beside_every_size(program: Path, form: str):
    """Each number in a group whose largest is not far above it, and in one with any other."""
    numbers = all_of_16_bits(FORMATS[form])
    by_size = numbers[numbers.float().abs().argsort()]
    for given in (numbers, by_size):
        assert_same(program, form, given[: len(given) // 128 * 128].view(-1, 128))


@pytest.mark.parametrize("form", FORMATS)
def test_ties_and_their_neighbours(program: Path, form: str):
    """Quotients in the middle of two codes, and a bit beside it."""
    dice = torch.Generator().manual_seed(2)
    groups = 4000
    dtype, shape = FORMATS[form], (groups, 128)
    largest = (torch.rand(groups, 1, generator=dice) + 1) * 2.0 ** torch.randint(-30, 14, (groups, 1), generator=dice)
    largest = largest.to(dtype)
    middles = torch.randint(0, 16, shape, generator=dice) + 0.5  # 448 is 14 * 2 ** 5, the smallest code 2 ** -9
    middles *= 2.0 ** torch.randint(-9, 5, shape, generator=dice)
    near = (middles * (largest.float() / 448)).to(dtype)
    bits = near.view(torch.int32 if form == "f32" else torch.int16)
    beside = (bits + torch.randint(-1, 2, shape, generator=dice).to(bits.dtype)).view(dtype).clamp(-largest, largest)
    beside = torch.where(torch.rand(shape, generator=dice) < 0.5, beside, -beside)
    beside[:, 5] = largest[:, 0]
    assert_same(program, form, beside)


@pytest.mark.parametrize("form", FORMATS)
def test_chance_of_all_sizes(program: Path, form: str):
    dice = torch.Generator().manual_seed(3)
    bits = torch.randint(-(1 << 31), 1 << 31, (4000, 128), generator=dice, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values = torch.where(values.isfinite(), values, torch.zeros(()))
    exponents = torch.randint(1, 254, (4000, 1), generator=dice, dtype=torch.int32)
    spread = (values.view(torch.int32) & ~0x7F800000 | exponents << 23).view(torch.float32)
    narrow = spread * 2.0 ** -torch.randint(0, 12, spread.shape, generator=dice)
    for given in (values, narrow):
        assert_same(program, form, (given.clamp(-6e4, 6e4) if form == "f16" else given).to(FORMATS[form]))


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_infinities_and_what_is_no_number(program: Path, form: str):
    dtype = FORMATS[form]
    tiny, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    odd = [0.0, -0.0, tiny, -tiny, tiny / 2, most, 1e-10, -1e-12, float("inf"), -float("inf"), float("nan")]
    groups = torch.zeros(len(odd) ** 2, 128, dtype=dtype)
    for i, pair in enumerate((a, b) for a in odd for b in odd):
        groups[i, 3], groups[i, 77] = pair
        groups[i, 4] = 1.0 if i % 2 else -0.0
    assert_same(program, form, groups)
