"""Weight formats as values: shapes, bytes and orders come from the format alone."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import dequantize_weights, quantize_weights
from megamoe_jit._layer.weights import transform_weights_for_mega_moe_sm90
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FORMATS, FP8, FP8_E5M2, MXFP4, WeightFormat
from tests.stubs import REPO

#: What a format of four bits, two to a byte, with a scale for 32 of a row would say.
NARROW = WeightFormat("narrow", "e2m1", 4, "uint8", "uint8", 1, (1, 32), "megamoe_jit._layer.fp8")


@pytest.mark.parametrize("stored", FORMATS.values())
def test_bytes_are_those_of_the_tensors(stored):
    rows, depth = 256, 384
    codes = torch.empty(stored.code_shape(rows, depth), dtype=stored.code_dtype)
    scales = torch.empty(stored.scale_shape(rows, depth), dtype=stored.scale_dtype)
    assert codes.numel() * codes.element_size() == stored.code_bytes(rows, depth)
    assert scales.numel() * scales.element_size() == stored.scale_bytes(rows, depth)
    assert stored.scale_size == scales.element_size()
    exponents = torch.empty(stored.exponent_shape(rows, depth), dtype=torch.uint8)
    assert exponents.numel() == stored.exponent_bytes(rows, depth)
    tensors = {"codes": codes, "exponents": exponents, "scales": scales}
    parts = {part.name: (part.dtype, part.shape) for part in stored.parts(rows, depth)}
    assert tuple(parts) == stored.part_names
    assert parts == {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in parts}
    assert stored.depth_of(codes.shape[1]) == depth
    assert stored.stream_bytes(rows, depth) == codes.numel() * codes.element_size() + exponents.numel()


def test_bits_are_made_bytes_nowhere_else():
    """Others ask only whether several weights share a byte."""
    for path in sorted((REPO / "megamoe_jit").rglob("*.py")):
        if path != REPO / "megamoe_jit/_spec/formats.py":
            assert not re.findall(r".*\.bits\b(?! < 8).*", path.read_text(encoding="utf-8")), path


def test_a_layer_is_its_matrices():
    assert FP8.expert_code_bytes(7168, 3072) == 3 * 7168 * 3072
    assert FP8.expert_bytes(7168, 3072) == 3 * 7168 * 3072 + 3 * (7168 // 128) * (3072 // 128) * 4


def test_a_narrow_format_is_counted_in_the_bytes_of_its_bits():
    assert NARROW.code_shape(256, 384) == (256, 192)
    assert NARROW.scale_shape(256, 384) == (256, 12)
    assert (NARROW.code_bytes(256, 384), NARROW.scale_bytes(256, 384)) == (256 * 192, 256 * 12)


def test_mxfp4_takes_four_bits_and_a_quarter():
    assert MXFP4.expert_code_bytes(7168, 3072) * 8 == 3 * 7168 * 3072 * 4.25
    assert MXFP4.stream_bytes(256, 128) == 16384 + 1024
    assert (FP8.exponent_shape(256, 128), FP8.exponent_bytes(256, 128)) == ((256, 0), 0)


def test_a_variant_says_which_codes_it_multiplies():
    shape = MoEShape(256, 128, 8, 2)
    assert {Variant.PINGPONG, Variant.COOPERATIVE} <= set(Variant.reading(FP8))
    assert Variant.PINGPONG not in Variant.reading(MXFP4)
    for stored in FORMATS.values():
        for variant in Variant:
            if variant in Variant.reading(stored):
                assert KernelSpec(shape, variant, weights=stored).weights is stored
            else:
                with pytest.raises(ConfigError, match=f"for weights in {stored.name}; {variant} takes [mf]"):
                    KernelSpec(shape, variant, weights=stored)


@pytest.mark.parametrize("stored", [each for each in FORMATS.values() if each is not FP8])
def test_the_command_that_compiles_a_kernel_names_its_format(stored):
    for variant in Variant.reading(stored):
        spec = KernelSpec(MoEShape(256, 128, 8, 2), variant, weights=stored)
        assert f" --weight-format {stored.name}" in spec.command
        assert KernelSpec.of_kernel_name(spec.kernel_name) == spec


@pytest.mark.parametrize("stored", FORMATS.values(), ids=str)
def test_copies_and_those_of_other_processes_are_the_same_object(stored):
    assert pickle.loads(pickle.dumps(stored)) is stored
    assert copy.deepcopy(stored) is stored
    for variant in Variant.reading(stored):
        spec = KernelSpec(MoEShape(256, 128, 8, 2), variant, weights=stored)
        assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_spec_holds_its_format():
    shape = MoEShape(256, 128, 8, 2)
    spec = KernelSpec(shape, Variant.PINGPONG)
    assert spec.weights is FP8
    assert spec.to_json()["weights"] == "fp8"
    wide = KernelSpec(shape, Variant.PINGPONG, weights=replace(FP8_E5M2, name="other", what="e4m3"))
    assert (wide.kernel_name, spec.kernel_name) == (
        "megamoe_pingpong_h256_i128_e8_k2_r1_other_fast",
        "megamoe_pingpong_h256_i128_e8_k2_r1_fast",
    )
    assert wide.weight_stage_bytes == spec.weight_stage_bytes == 256 * 128
    old = {name: value for name, value in spec.to_json().items() if name != "weights"}
    assert KernelSpec.from_json(old) == spec, "entries that were cached before formats had names"
    with pytest.raises(ConfigError, match="unknown weight format 'int3'; allowed: fp8, fp8e5m2, mxfp4"):
        KernelSpec.from_json({**old, "weights": "int3"})
    with pytest.raises(ConfigError, match="weights = 'fp8' is not supported; allowed: a WeightFormat"):
        KernelSpec(shape, Variant.PINGPONG, weights="fp8")


def test_fp8_packs_as_the_transform_does_and_dequantises_what_is_not_packed():
    torch.manual_seed(0)
    l1, l2 = quantize_weights(torch.randn(2, 512, 128)), quantize_weights(torch.randn(2, 128, 256))
    t1, t2 = transform_weights_for_mega_moe_sm90(l1, l2)
    for (codes, _), (packed, _), gated in ((l1, t1, True), (l2, t2, False)):
        for plain, ordered in zip(codes.view(torch.uint8), packed.view(torch.uint8), strict=True):
            assert torch.equal(FP8.pack(plain, gated), ordered)
            assert torch.equal(FP8.unpack(ordered, gated), plain)
    assert torch.equal(FP8.dequantize(*l1), dequantize_weights(*l1))
