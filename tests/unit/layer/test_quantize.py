"""The quantisers: exact scales, bounded error, special values, and a second opinion."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import quantize as _quant
from megamoe_jit._layer.quantize import (
    dequantize_activations,
    dequantize_weights,
    quantize_activations,
    quantize_weights,
)

E4M3 = torch.float8_e4m3fn


def test_activation_scales_are_amax_over_448_per_group():
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize_activations(x)
    assert (codes.dtype, scales.dtype) == (E4M3, torch.float32)
    assert (codes.shape, scales.shape) == ((5, 384), (5, 3))
    for t in range(5):
        for g in range(3):
            group = x[t, 128 * g : 128 * g + 128]
            assert scales[t, g] == group.abs().max() / 448.0
            assert codes[t, 128 * g : 128 * g + 128].float().abs().max() == 448.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(-30, 30), st.integers(1, 4), st.integers(1, 3))
def test_activation_round_trip_is_within_half_a_step(seed, exponent, tokens, groups):
    x = torch.randn(tokens, 128 * groups, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scales = quantize_activations(x)
    error = (dequantize_activations(codes, scales) - x).abs()
    # e4m3 has three mantissa bits (2**-4 relative) and steps of 2**-9 below 2**-6
    step = scales.repeat_interleave(128, dim=-1)
    assert (error <= torch.maximum(x.abs() * 2.0**-4, step * 2.0**-10) * 1.0001).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-20, 20))
def test_dequantised_activations_quantise_to_themselves(seed, exponent):
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    once = dequantize_activations(*quantize_activations(x))
    twice = dequantize_activations(*quantize_activations(once))
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_zero_and_tiny_groups_use_the_floor():
    x = torch.zeros(2, 128)
    x[1, 0] = 1e-12
    codes, scales = quantize_activations(x)
    assert (scales == torch.tensor(1e-10) / 448.0).all()
    assert (codes[0].float() == 0).all()
    assert codes[1, 0].float() == 4.5  # 4.48 to the nearest code
    assert (dequantize_activations(codes, scales)[0] == 0).all()


def test_nan_and_infinity_stay_in_their_group():
    x = torch.ones(2, 256)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    codes, scales = quantize_activations(x)
    assert codes[0, 5].isnan()
    assert codes[1, 200].isnan()
    assert scales[0, 0].isnan()
    assert scales[1, 1].isinf()
    back = dequantize_activations(codes, scales)
    assert (back[0, 128:] == 1).all()
    assert (back[1, :128] == 1).all()


def test_nothing_beyond_e4m3_is_converted(monkeypatch):
    """What lies beyond saturates in newer releases of torch by itself, and becomes NaN in older ones."""
    monkeypatch.setattr(_quant, "torch", SimpleNamespace(float8_e4m3fn=torch.float32))
    values = torch.tensor([-1e4, -448.5, -3.0, 447.0, 449.0, float("inf")])
    assert _quant._encode(values, torch.tensor(1.0)).tolist() == [-448, -448, -3, 447, 448, 448]


def test_bfloat16_input_and_no_rows():
    x = torch.randn(4, 128).bfloat16()
    for a, b in zip(quantize_activations(x), quantize_activations(x.float()), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    codes, scales = quantize_activations(torch.empty(0, 256))
    assert (codes.shape, scales.shape) == ((0, 256), (0, 2))
    assert dequantize_activations(codes, scales).shape == (0, 256)


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_weight_scales_are_amax_over_448_per_block(lead):
    w = torch.randn(*lead, 256, 384, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize_weights(w)
    assert (codes.dtype, scales.dtype) == (E4M3, torch.float32)
    assert (codes.shape, scales.shape) == (w.shape, (*lead, 2, 3))
    for i in range(2):
        for j in range(3):
            block = w[..., 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            assert torch.equal(scales[..., i, j], block.abs().amax(dim=(-2, -1)) / 448.0)
    error = (dequantize_weights(codes, scales) - w).abs()
    assert (error <= w.abs() * 2.0**-4 + scales.max() * 2.0**-10).all()


def test_weights_agree_with_transformers():
    pytest.importorskip("transformers")
    quantizers = pytest.importorskip("transformers.integrations.finegrained_fp8")
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(3)) * 0.05
    out = quantizers.Fp8Quantize(_Quantizer()).convert({"m.weight": w.clone()})
    codes, scales = quantize_weights(w)
    theirs = next(v for k, v in out.items() if k.endswith("weight"))
    their_scales = next(v for k, v in out.items() if "scale" in k)
    torch.testing.assert_close(scales, their_scales.float(), rtol=1e-6, atol=0)
    assert (codes.view(torch.uint8) == theirs.view(torch.uint8)).float().mean() > 0.999


class _Quantizer:
    class quantization_config:  # noqa: N801  the attribute transformers reads
        weight_block_size = (128, 128)
        scale_fmt = "float"


def test_refusals_name_the_value():
    with pytest.raises(ConfigError, match="hidden = 2880 is not supported"):
        quantize_activations(torch.zeros(2, 2880))
    with pytest.raises(ConfigError, match="3 dimensions"):
        quantize_activations(torch.zeros(2, 2, 128))
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        quantize_activations(torch.zeros(2, 128, dtype=torch.int64))
    with pytest.raises(ConfigError, match="128 x 100"):
        quantize_weights(torch.zeros(128, 100))
    with pytest.raises(ConfigError, match="1 dimensions"):
        quantize_weights(torch.zeros(128))
    codes = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    for again in (quantize_weights, quantize_activations):
        with pytest.raises(ConfigError, match="float8_e4m3fn; allowed: bfloat16 or wider; codes go with their scales"):
            again(codes)


@pytest.mark.parametrize(
    ("back", "shape", "scales"),
    [(dequantize_activations, (3, 256), (3, 2)), (dequantize_weights, (2, 256, 128), (2, 2, 1))],
)
def test_what_is_no_pair_does_not_come_back(back, shape, scales):
    codes = torch.zeros(shape).to(torch.float8_e4m3fn)
    assert back(codes, torch.ones(scales)).shape == shape
    with pytest.raises(ConfigError, match=r"are torch\.float32, scales torch\.float32; allowed: float8_e4m3fn"):
        back(codes.float(), torch.ones(scales))
    with pytest.raises(ConfigError, match=r"scales torch\.float16"):
        back(codes, torch.ones(scales).half())
    wrong = [(codes, torch.ones(*scales, 1)), (codes, torch.ones(scales[:-1])), (codes[..., :100], torch.ones(scales))]
    wrong += [(codes.view(-1), torch.ones(scales)), (codes[None][None, :, 0], torch.ones(scales))]
    for pair in wrong:
        with pytest.raises(ConfigError, match=r"have shape \("):
            back(*pair)
    with pytest.raises(ConfigError, match="2, "):
        dequantize_activations(codes.view(1, -1, 128), torch.ones(1, codes.numel() // 128, 1))
