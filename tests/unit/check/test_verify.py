"""The verify runner, driven by a stand-in layer: the reference passes, every kind of mistake is caught."""

import math
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._check import scenarios as table
from megamoe_jit._check.verify import Runs, WeightCache, judge, run_all, run_scenario
from megamoe_jit._errors import DeviceFaultError, LaunchError
from megamoe_jit._layer.weights import inverse_transform_weights_for_mega_moe_sm90, transform_weights_for_mega_moe_sm90
from megamoe_jit.reference import expert_counts, moe_reference, with_shared_experts


class Layer:
    """The package's interface over the reference; `mistake(y, stats, buffer, tokens)` spoils a call."""

    transform_weights_for_mega_moe_sm90 = staticmethod(transform_weights_for_mega_moe_sm90)

    def __init__(self, mistake=None):
        self.mistake = mistake
        self.calls = []
        self.alive = 0
        self._transformed = None

    def get_symm_buffer_for_mega_moe(self, group, experts, capacity, topk, hidden, intermediate, shared=0):
        assert group is None
        self.alive += 1

        def destroy():
            self.alive -= 1

        return SimpleNamespace(
            x=torch.zeros(capacity, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
            x_sf=torch.zeros(capacity, hidden // 128),
            topk_idx=torch.zeros(capacity, topk, dtype=torch.int64),
            topk_weights=torch.zeros(capacity, topk),
            check=lambda: None,
            destroy=destroy,
            shared=shared,
        )

    def _run(self, name, y, l1, l2, buffer, stats, *, activation_clamp, fast_math=True):
        self.calls.append(name)
        t = y.shape[0]
        assert y.isnan().all()
        views = buffer.x[:t], buffer.x_sf[:t], buffer.topk_idx[:t], buffer.topk_weights[:t]
        if self._transformed is None or self._transformed[0][0] is not l1[0]:  # scenarios of one shape share them
            self._transformed, self._weights = (l1, l2), inverse_transform_weights_for_mega_moe_sm90(l1, l2)
        l1, l2 = self._weights
        slots = with_shared_experts(*views[2:], stats.numel(), buffer.shared)
        y.copy_(moe_reference(*views[:2], *slots, l1, l2, activation_clamp=activation_clamp))
        stats += expert_counts(views[2], stats.numel())
        if self.mistake is not None:
            self.mistake(y, stats, buffer, t)

    def fp8_mega_moe(self, *args, **kwargs):
        self._run("auto", *args, **kwargs)

    def fp8_mega_moe_pingpong(self, *args, **kwargs):
        self._run("pingpong", *args, **kwargs)

    def fp8_mega_moe_cooperative(self, *args, **kwargs):
        self._run("cooperative", *args, **kwargs)


SMALL = (
    "L1,L4,tokens.t[0-7]_of_256,padding.t37_of_300",
    "shared.*.t0,shared.*.t1,shared.*.t96,shared.*.t37_of_300",
    "route.lognormal.t96,route.powerlaw*.t96,route.balanced.t96,route.tile_edges",
    "route.hot.t96,route.single.t96,route.duplicate.t96,mask.*.t96",
    "data.*.t96",
)


def test_the_small_scenarios_are_many():
    assert len({s.name for part in SMALL for s in table.select(part)}) > 30


@pytest.mark.parametrize("part", SMALL)
def test_a_right_layer_passes_everything(part):
    layer = Layer()
    seen = []
    outcomes = run_all(Runs(part, ("auto",)), "cpu", seen.append, api=layer)
    assert len(outcomes) == len(table.select(part)) >= 5
    assert [o for o in outcomes if not o.passed] == []
    assert seen == outcomes
    assert max(o.diff for o in outcomes) == 0.0
    assert layer.alive == 0


def test_variants_reach_their_own_function():
    layer = Layer()
    outcomes = run_all(Runs("L1.smoke", ("pingpong", "cooperative", "auto")), "cpu", api=layer)
    assert layer.calls == ["pingpong", "cooperative", "auto"]
    assert [(o.name, o.variant) for o in outcomes] == [("L1.smoke", v) for v in layer.calls]


def test_weights_of_another_format_are_judged_by_its_definition():
    layer = Layer()
    outcomes = run_all(Runs("L1.smoke,mxfp4.masked.t96", ("auto", "pingpong"), weights="mxfp4"), "cpu", api=layer)
    assert [(o.name, o.variant, o.weights) for o in outcomes] == [
        (name, "auto", "mxfp4") for name in ("L1.smoke", "mxfp4.masked.t96")
    ]
    assert all(o.passed for o in outcomes), [o.reason for o in outcomes]
    assert max(o.diff for o in outcomes) == 0.0


def scale_row(y, stats, buffer, t):
    y[3] *= 1.2


def scale_all(y, stats, buffer, t):
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    y.copy_(y.float() * (1 + 0.03 * noise))


def write_past(y, stats, buffer, t):
    torch.as_strided(y, (t + 1, y.shape[1]), y.stride())[t] = 0


def skip_a_row(y, stats, buffer, t):
    y[1] = float("nan")


def leak_nan(y, stats, buffer, t):
    y[7] = float("nan")


def hide_nan(y, stats, buffer, t):
    y[5] = 0


def miscount(y, stats, buffer, t):
    stats[2] += 1


def replace_counts(y, stats, buffer, t):
    stats -= 7


def touch_zero_row(y, stats, buffer, t):
    y[0, 0] = 1e-30


def read_padding(y, stats, buffer, t):
    y[0] += buffer.x_sf[t, 0]


@pytest.fixture(scope="module")
def cache():
    return WeightCache()


@pytest.mark.parametrize(
    ("scenario", "mistake", "reason"),
    [
        ("L1.smoke", scale_row, "> 0.002 in row 3"),
        ("L1.smoke", scale_all, "diff 0.00"),
        ("L1.smoke", write_past, "rows past the token count were written"),
        ("L1.smoke", skip_a_row, "1 rows are not finite, first 1"),
        ("L1.smoke", miscount, "counter of expert 2 is"),
        ("L1.smoke", replace_counts, "counter of expert 0 is"),
        ("L4.mask_all", touch_zero_row, "rows that must be zero are not"),
        ("data.nan_row.t96", leak_nan, "1 rows are not finite, first 7"),
        ("data.nan_row.t96", hide_nan, "1 rows are not NaN where the reference is, first 5"),
        ("data.zero_rows.t96", touch_zero_row, "rows that must be zero are not"),
        ("padding.t37_of_300", read_padding, "1 rows are not finite, first 0"),
    ],
)
def test_a_mistake_is_caught_and_named(scenario, mistake, reason, cache):
    outcome = run_scenario(table.get(scenario), "auto", "cpu", cache=cache, api=Layer(mistake))
    assert not outcome.passed
    assert reason in outcome.reason


def test_leaving_out_the_requantisation_is_caught():
    """The bound is below the quantisation error, so a layer that skips it does not pass for a right one."""

    class Exact(Layer):
        def _run(self, name, y, l1, l2, buffer, stats, *, activation_clamp, fast_math=True):
            t = y.shape[0]
            views = buffer.x[:t], buffer.x_sf[:t], buffer.topk_idx[:t], buffer.topk_weights[:t]
            pair = inverse_transform_weights_for_mega_moe_sm90(l1, l2)
            y.copy_(moe_reference(*views, *pair, activation_clamp=activation_clamp, requantize=False))
            stats += expert_counts(views[2], stats.numel())

    outcome = run_scenario(table.get("L1.smoke"), "auto", "cpu", api=Exact())
    assert not outcome.passed
    assert "diff 0.0002" in outcome.reason


@pytest.mark.parametrize("kind", [LaunchError, torch.OutOfMemoryError, KeyError])
def test_an_error_fails_its_scenario_alone(kind):
    def refuse(*_):
        raise kind("no")

    layer = Layer(refuse)
    outcomes = run_all(Runs("L1,L4.fm0", ("pingpong",)), "cpu", api=layer)
    said = f"{kind.__name__}: {kind('no')}"
    assert [(o.passed, o.reason) for o in outcomes] == [(False, said)] * 2
    assert math.isnan(outcomes[0].diff)
    assert layer.alive == 0


def test_a_device_fault_ends_the_run():

    def fault(*_):
        raise DeviceFaultError("gone")

    layer = Layer(fault)
    outcomes = run_all(Runs("L1,L4.fm0", ("pingpong",)), "cpu", api=layer)
    assert [o.reason for o in outcomes] == ["DeviceFaultError: gone"]
    assert layer.alive == 1  # freeing on a broken context would hide the fault


def test_equal_shapes_share_one_set_of_weights(monkeypatch):
    drawn = []
    plain = table.make_weights
    monkeypatch.setattr(table, "make_weights", lambda *a: drawn.append(a) or plain(*a))
    run_all(Runs("L1,L4.fm0,tokens.t1_of_1,L4.fm1", ("pingpong", "cooperative")), "cpu", api=Layer())
    assert len(drawn) == 2


def test_judge_takes_the_bounds_as_inclusive_and_empty_output_as_right():
    empty = torch.empty(0, 128, dtype=torch.bfloat16)
    verdict = judge(empty, empty)
    assert verdict.passed
    assert (verdict.diff, verdict.worst_row_diff) == (0.0, 0.0)
    negative_zero = torch.full((1, 128), -0.0, dtype=torch.bfloat16)
    assert judge(negative_zero, torch.zeros_like(negative_zero)).passed


@pytest.mark.parametrize("wrong", [[4], [3, 4], []], ids=["elsewhere", "one more", "none"])
def test_a_row_is_nan_in_the_columns_where_the_reference_is_and_in_no_other(wrong):
    expected = torch.ones(3, 128, dtype=torch.bfloat16)
    right, y = expected.clone(), expected.clone()
    expected[1, 3] = right[1, 3] = y[1, wrong] = float("nan")
    assert judge(right, expected).passed
    verdict = judge(y, expected)
    assert not verdict.passed
    assert verdict.reason == "1 rows are not NaN where the reference is, first 1"


def test_judge_looks_at_every_number_of_a_row():
    expected = torch.ones(4, 128, dtype=torch.bfloat16)
    y = expected.clone()
    y[2, 5] = float("inf")
    assert judge(y, expected).reason.startswith("1 rows are not finite, first 2")
