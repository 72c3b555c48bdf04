"""Weight formats as values: shapes, bytes and orders come from the format alone."""

from __future__ import annotations

import pytest
import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.quantize import dequantize_weights, quantize_weights
from megamoe_jit._layer.weights import transform_weights_for_mega_moe_sm90
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FORMATS, FP8, WeightFormat

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


def test_a_layer_is_its_matrices():
    assert FP8.expert_code_bytes(7168, 3072) == 3 * 7168 * 3072
    assert FP8.expert_bytes(7168, 3072) == 3 * 7168 * 3072 + 3 * (7168 // 128) * (3072 // 128) * 4


def test_a_narrow_format_is_counted_in_the_bytes_of_its_bits():
    assert NARROW.code_shape(256, 384) == (256, 192)
    assert NARROW.scale_shape(256, 384) == (256, 12)
    assert (NARROW.code_bytes(256, 384), NARROW.scale_bytes(256, 384)) == (256 * 192, 256 * 12)


def test_a_spec_holds_its_format():
    shape = MoEShape(256, 128, 8, 2)
    spec = KernelSpec(shape, Variant.PINGPONG)
    assert spec.weights is FP8
    assert spec.to_json()["weights"] == "fp8"
    narrow = KernelSpec(shape, Variant.PINGPONG, weights=NARROW)
    assert (narrow.kernel_name, spec.kernel_name) == (
        "megamoe_pingpong_h256_i128_e8_k2_r1_narrow_fast",
        "megamoe_pingpong_h256_i128_e8_k2_r1_fast",
    )
    assert narrow.weight_stage_bytes == spec.weight_stage_bytes // 2
    old = {name: value for name, value in spec.to_json().items() if name != "weights"}
    assert KernelSpec.from_json(old) == spec, "entries that were cached before formats had names"
    with pytest.raises(ConfigError, match="unknown weight format 'int3'; allowed: fp8"):
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
