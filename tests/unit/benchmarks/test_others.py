"""benchmarks/others: what can be told of other kernels where there is no GPU, and none of them is installed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.others import __main__ as others
from benchmarks.others.humming import _for_these
from benchmarks.others.marlin import repacked, scales
from benchmarks.others.vllm_ops import VARIABLE
from megamoe_jit._check.scenarios import Scenario, make_inputs, make_weights
from megamoe_jit._spec import MXFP4, MoEShape
from megamoe_jit.reference import calc_diff, moe_reference

SHAPE, CLAMP = MoEShape(256, 128, 4, 2), 10.0


@pytest.mark.parametrize(("row", "depth"), [(0, 0), (9, 5), (70, 47), (127, 32)])
def test_a_code_is_where_a_lane_of_mma_m16n8k16_looks_for_it(row: int, depth: int):
    codes = torch.zeros(128, 24, dtype=torch.uint8)
    codes[row, depth // 2] = 5 << 4 * (depth % 2)
    words = repacked(codes).view(3, 2, 32, 4)  # K / 16, N / 64, lanes, tiles of 16 rows
    (where,) = words.nonzero().tolist()
    assert where == [depth // 16, row // 64, 4 * (row % 8) + depth % 8 // 2, row % 64 // 16]
    nibble = 4 * (depth % 2) + 2 * (row % 16 // 8) + depth % 16 // 8
    assert int(words[tuple(where)]) == 5 << 4 * nibble


def test_every_exponent_is_kept_once():
    exponents = torch.arange(64 * 4, dtype=torch.uint8).view(64, 4)
    laid = scales(exponents).view(torch.uint8)
    assert laid.shape == (4, 64)
    assert all(sorted(laid[group].tolist()) == sorted(exponents[:, group].tolist()) for group in range(4))


def test_exact_rows_differ_from_the_layer_by_what_activations_in_fp8_cost():
    weights = make_weights(SHAPE, "cpu", 0, MXFP4)
    inputs = make_inputs(Scenario("exact", SHAPE, 24, 24, weights=MXFP4.name), "cpu", weights=weights)
    where = torch.arange(0, 24, 5)
    exact = others.exact_rows(inputs, weights, where, CLAMP)
    routed = inputs.x_q, inputs.x_sf, inputs.topk_idx, inputs.topk_weights
    layer = moe_reference(*routed, weights.l1, weights.l2, activation_clamp=CLAMP)[where]
    assert others.BF16_BOUND < calc_diff(layer, exact) < others.FP8_BOUND


def test_what_is_not_installed_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    made = others.Made(None, make_weights(SHAPE, "cpu", 0, MXFP4), SHAPE, [1, 8], others.OTHERS)  # type: ignore[arg-type]
    assert not made.others
    assert list(made.refused) == [kind.name for kind in others.OTHERS]
    assert all(reason.endswith("is not installed") for reason in made.refused.values()), made.refused


def test_humming_keeps_the_configurations_of_the_counts_and_covers_all_others():
    choices = [(0, 8, "a"), (8, 48, "b"), (48, 1 << 30, "c")]
    assert _for_these(choices, [6, 48, 384]) == [[0, 6, "a"], [6, 48, "b"], [48, 1 << 30, "c"]]
    assert _for_these(choices, [48]) == [[0, 1 << 30, "b"]]
