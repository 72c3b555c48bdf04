"""The scenario table: complete, well-formed, and its inputs are what their names say."""

import dataclasses
import random

import pytest
import torch

from megamoe_jit._check import scenarios as table
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import FORMAT_BY_TYPE
from megamoe_jit._spec import FORMATS, FP8, KernelSpec, Variant
from megamoe_jit.reference import expert_counts

NAMES = [s.name for s in table.SCENARIOS]


@pytest.fixture(scope="module")
def inputs():
    """Inputs by scenario; their weights, which no test here looks at, are not drawn but stood in for."""
    tensor = torch.empty(0)
    weights = table.Weights((tensor, tensor), (tensor, tensor))

    def make(scenario, seed=0):
        if isinstance(scenario, str):
            scenario = table.get(scenario)
        return table.make_inputs(scenario, "cpu", seed, weights)

    return make


def test_names_are_unique_and_sound():
    assert len(set(NAMES)) == len(NAMES)
    for s in table.SCENARIOS:
        assert 0 <= s.tokens <= s.capacity
        assert s.capacity >= 1
        for variant in s.runs(tuple(Variant)):
            assert KernelSpec(s.shape, variant, weights=FORMATS[s.weights]).stages >= 3, s.name


def test_any_scenario_runs_with_any_format_and_what_multiplies_it():
    own = {s.weights for s in table.select("mxfp4")}
    assert own == {"mxfp4"}
    assert {s.weights for s in table.select("L1,L2")} == {"fp8"}
    for name, stored in FORMATS.items():
        (other,) = table.select("L1.smoke", weights=name)
        assert (other.name, other.weights) == ("L1.smoke", name)
        assert other.runs(("auto", *Variant)) == ("auto", *Variant.reading(stored))
    with pytest.raises(ConfigError, match="unknown weight format 'int4'; allowed: fp8"):
        table.select("L1.smoke", weights="int4")


def test_weights_of_all_packed_formats_have_the_same_values():
    shape = table.get("L1.smoke").shape
    packed = [stored for stored in dict.fromkeys(FORMAT_BY_TYPE.values()) if stored is not FP8]
    made = {stored.name: table.make_weights(shape, "cpu", 0, stored) for stored in packed}
    values = [FORMATS[name].dequantize(*weights.l2) for name, weights in made.items()]
    assert all(torch.equal(values[0], other) for other in values[1:])
    assert values[0].std() == pytest.approx(0.05, rel=0.1)
    inputs = table.make_inputs(*table.select("L1.smoke", weights="mxfp4"), "cpu")
    assert torch.equal(inputs.l1[0], made["mxfp4"].l1[0])


def test_weights_that_a_call_would_take_for_those_of_another_format_are_refused():
    """Else the kernels of that one would be run, and pass."""
    other = dataclasses.replace(FP8, name="powers", scale_type="float8_e8m0fnu", scale_size=1)
    with pytest.raises(ConfigError, match="weights in powers cannot be drawn: no call .* allowed: fp8, fp8e5m2, mx"):
        table.make_weights(table.get("L1.smoke").shape, "cpu", 0, other)


def test_the_peers_cases_are_all_there():
    expected = {"L1.smoke"}
    expected |= {f"L2.heur.{n}" for n in ("small.t64", "midA.t256", "midB.t512", "large.t2048")}
    expected |= {f"L2.profile_topk8.t{t}" for t in (16, 64, 260, 1024)} | {"L2.generic_topk6.t512"}
    expected |= {f"L3.h{h}_ih{i}_k{k}" for h in (512, 2048) for i in (512, 2048) for k in (1, 2, 4)}
    expected |= {"L3.h200_flash_m128", "L3.h200_pro_m128", "L3.h200_pro_m256"}
    expected |= {"L3.h200_range_alt_compact_load24", "L3.h200_range_alt_wide_load32"}
    expected |= {"L4.mask0.0", "L4.mask0.3", "L4.mask0.7", "L4.mask_all", "L4.clamp1.0", "L4.clamp10.0"}
    expected |= {"L4.clampinf", "L4.fm0", "L4.fm1", "L4.tokens0", "L4.tokens_max"}
    expected |= {f"L5.rand{i:03d}" for i in range(24)}
    assert {n for n in NAMES if n[0] == "L"} == expected
    assert table.get("L4.clampinf").clamp is None
    assert (table.get("L4.tokens0").tokens, table.get("L4.tokens0").capacity) == (0, 128)


def test_the_stress_recipe_draws_in_the_peers_order():
    rng = random.Random(0xC0FFEE)
    for i in range(24):
        s = table.get(f"L5.rand{i:03d}")
        sizes = rng.choice([512, 1024, 2048]), rng.choice([512, 1024, 2048]), rng.choice([1, 2, 4])
        tokens, mask = rng.choice([32, 64, 128, 256, 512]), rng.choice([0.0, 0.0, 0.3, 0.5])
        clamp, fast = rng.choice([1.0, 10.0, float("inf")]), rng.choice([True, False])
        assert (s.shape.hidden, s.shape.intermediate, s.shape.topk) == sizes
        assert (s.tokens, s.masked_ratio, s.fast_math) == (tokens, mask, fast)
        assert s.clamp == (None if clamp == float("inf") else clamp)


def test_odd_sizes_and_bounds_are_covered():
    shapes = [s.shape for s in table.SCENARIOS]
    assert {1408, 2304} <= {s.hidden for s in shapes}
    assert {768, 1408} <= {s.intermediate for s in shapes}
    assert {1, 12, 32} <= {s.topk for s in shapes}
    assert {1, 8, 33, 512, 1024} <= {s.experts for s in shapes}
    assert {0, 1, 255, 256, 257} <= {s.tokens for s in table.SCENARIOS}
    k_blocks = {s.hidden // 128 for s in shapes}
    assert {1, 2, 5, 6, 11, 18, 56} <= k_blocks
    assert any(s.slow and s.tokens == 8192 for s in table.SCENARIOS)
    assert {s.fast_math for s in table.SCENARIOS} == {True, False}


def test_a_call_is_told_of_the_options_that_are_not_the_default():
    assert table.get("L4.fm1").options == {"activation_clamp": 10.0}
    assert table.get("L4.fm0").options == {"activation_clamp": 10.0, "fast_math": False}


@pytest.mark.parametrize("scenario", table.SCENARIOS, ids=lambda s: s.name)
def test_inputs_have_the_contract_shapes(scenario, inputs):
    if scenario.slow:  # gigabytes that are drawn by the same lines
        scenario = dataclasses.replace(scenario, tokens=min(scenario.tokens, 1024))
    i, s, t = inputs(scenario), scenario.shape, scenario.tokens
    assert (i.x.dtype, i.x.shape) == (torch.bfloat16, (t, s.hidden))
    assert (i.x_q.dtype, i.x_q.shape) == (torch.float8_e4m3fn, (t, s.hidden))
    assert (i.x_sf.dtype, i.x_sf.shape) == (torch.float32, (t, s.hidden // 128))
    assert (i.topk_idx.dtype, i.topk_idx.shape) == (torch.int64, (t, s.topk))
    assert (i.topk_weights.dtype, i.topk_weights.shape) == (torch.float32, (t, s.topk))
    if t:
        assert i.topk_idx.min() >= -1
        assert i.topk_idx.max() < s.experts
    if scenario.route not in ("duplicate", "single"):
        for row in i.topk_idx.tolist():
            live = [e for e in row if e >= 0]
            assert len(set(live)) == len(live)


def test_inputs_depend_on_seed_and_name_alone(inputs):
    a, b, c = inputs("L1.smoke"), inputs("L1.smoke"), inputs("L1.smoke", seed=1)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.topk_idx, b.topk_idx)
    assert not torch.equal(a.x, c.x)
    assert not torch.equal(inputs("L4.fm0").x, inputs("L4.fm1").x)


def test_weights_depend_on_shape_and_seed_and_spread_as_said():
    shape = table.get("L1.smoke").shape
    a, b, c = (table.make_weights(shape, "cpu", seed) for seed in (0, 0, 1))
    assert torch.equal(a.l1[0].view(torch.uint8), b.l1[0].view(torch.uint8))
    assert not torch.equal(a.l1[0].view(torch.uint8), c.l1[0].view(torch.uint8))
    inputs = table.make_inputs(table.get("L1.smoke"), "cpu")
    assert torch.equal(inputs.l1[0].view(torch.uint8), a.l1[0].view(torch.uint8))
    for (codes, scales), (n, k) in ((a.l1, (2 * 512, 512)), (a.l2, (512, 512))):
        assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, (8, n, k))
        assert (scales.dtype, scales.shape) == (torch.float32, (8, n // 128, k // 128))
    w = a.l2[0].float() * a.l2[1].repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert w.std() == pytest.approx(0.05, rel=0.02)
    assert not torch.equal(a.l1[0][0].view(torch.uint8), a.l1[0][1].view(torch.uint8))


def test_routes_are_what_they_say(inputs):
    counts = lambda name: expert_counts(inputs(name).topk_idx, table.get(name).shape.experts)  # noqa: E731
    assert counts("route.tile_edges").tolist() == list(table.TILE_EDGES)
    assert counts("route.hot.t600")[0] == 600
    assert (inputs("route.hot.t600").topk_idx[:, 0] == 0).all()
    assert counts("route.single.t600").tolist() == [0] * 15 + [2400]
    assert set(counts("route.balanced.t600").tolist()) == {150}
    idx = inputs("route.duplicate.t600").topk_idx
    assert (idx[:, 0] == idx[:, 1]).all()
    spread = {n: float(counts(f"route.{n}.t600").max() / 150) for n in ("powerlaw0.6", "powerlaw1.2", "lognormal")}
    assert 1.3 < spread["powerlaw0.6"] < spread["powerlaw1.2"]
    assert spread["lognormal"] > 1.3
    assert (inputs("L1.smoke").topk_weights < 0).any()


def test_masks_are_what_they_say(inputs):
    assert (inputs("L4.mask_all").topk_idx == -1).all()
    half = inputs("mask.half.t600")
    assert 0.45 < (half.topk_idx == -1).float().mean() < 0.55
    assert (half.topk_weights[half.topk_idx == -1] == 0).all()
    bad = inputs("mask.weight_nan.t96")
    assert torch.equal(bad.topk_weights.isnan(), bad.topk_idx == -1)
    assert (bad.topk_idx == -1).any()


def test_data_are_what_they_say(inputs):
    assert (inputs("data.zero_rows.t96").x[::3] == 0).all()
    assert (inputs("data.saturating.t96").x_q.float().abs() == 448).all()
    assert inputs("data.saturating.t96").x.abs().max().item() == pytest.approx(1e4, rel=0.01)
    outliers = inputs("data.outliers.t96").x.float().abs()
    assert outliers[::2].max() > 2 * outliers[1::2].max()
    rms = inputs("data.ladder.t600").x.float().pow(2).mean(-1).sqrt()
    assert rms.min() < 2e-12
    assert rms.max() > 5e3
    assert not ((rms > 3e-9) & (rms < 5e-7)).any()
    nan = inputs("data.nan_row.t96")
    assert nan.x_q.isnan().any(-1).nonzero().flatten().tolist() == [5, 6]


def test_select():
    names = lambda *a, **k: [s.name for s in table.select(*a, **k)]  # noqa: E731
    slow = {s.name for s in table.SCENARIOS if s.slow}
    assert slow
    assert names(slow=True) == NAMES
    assert names("") == names("*") == [n for n in NAMES if n not in slow]
    assert names("L4") == [n for n in NAMES if n.startswith("L4.")]
    assert names("L1.smoke, threshold") == ["L1.smoke", "threshold.t255", "threshold.t256", "threshold.t257"]
    assert names("route.hot") == ["route.hot.t96", "route.hot.t600"]
    assert names("prod.flash.t8192") == ["prod.flash.t8192"]
    assert "prod.flash.t8192" not in names("prod")
    with pytest.raises(ConfigError, match=r"no scenario fits 'nope'.*L1, L2"):
        table.select("L1,nope")
    with pytest.raises(ConfigError, match="unknown scenario 'L1'"):
        table.get("L1")
