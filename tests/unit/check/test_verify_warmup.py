"""`verify` compiles everything that its scenarios need before the first of them runs, in one parallel warmup."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from megamoe_jit import KernelSpec, Variant
from megamoe_jit._bench import measure as _bench
from megamoe_jit._check import scenarios as _scenarios
from megamoe_jit._check import verify as _verify
from megamoe_jit._check import verify_ranks as _verify_ranks
from megamoe_jit._check.documents import Outcome
from megamoe_jit._cli import _io, _kernels, cli
from megamoe_jit._errors import CompileError
from megamoe_jit._jit import runtime as _runtime
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FORMATS, FP8, MXFP4
from megamoe_jit._spec.variants import VARIANT_NAMES
from tests.commandline import checked
from tests.stubs import TEMPLATE

NAMES = "L1.smoke,L4.fm0,threshold.t255"  #: two shapes, one of them with both kinds of arithmetic
RUNS = 3 * len(Variant.reading(FP8))


READERS = Variant.reading(FP8)


def kernels_of(pattern, variants=VARIANT_NAMES, ranks=1, weights=None):
    return {
        KernelSpec(s.shape, Variant(v), ranks, numerics=s.numerics, weights=FORMATS[s.weights])
        for s in _scenarios.select(pattern, weights=weights)
        for v in s.runs(variants)
    }


def passed(name, variant):
    return Outcome(name, variant, 0.0, 0.0, True, True, "")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No torchrun, and the CPU as if it were a GPU."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_bench, "require_hopper", lambda: torch.device("cpu"))


@pytest.fixture
def events(monkeypatch):
    """What happens, in order: ("warmup", kernels, jobs) and ("run", scenario, variant) or ("ranks",)."""
    seen = []

    def warmup(specs, jobs=None, force=False, progress=None):
        assert not force
        seen.append(("warmup", list(specs), jobs))
        results = [_runtime.WarmupResult(spec, None, CompileError("no"), 0.1) for spec in specs]
        for result in results:
            if progress is not None:
                progress(result)
        return results

    def run_scenario(scenario, variant, *_, **__):
        seen.append(("run", scenario.name, variant))
        return passed(scenario.name, variant)

    def run_ranks(ranks, runs, *_):
        seen.append(("ranks",))
        return [passed(s.name, v) for s in runs.chosen(ranks) for v in s.runs(runs.variants)]

    monkeypatch.setattr(_runtime, "warmup", warmup)
    monkeypatch.setattr(_verify, "run_scenario", run_scenario)
    monkeypatch.setattr(_verify_ranks, "run_ranks", run_ranks)
    return seen


def verify(*words, pattern=NAMES, code=0):
    done = CliRunner().invoke(cli, ["verify", "--filter", pattern, *words])
    assert done.exit_code == code, done.output
    return done


def test_all_kernels_are_asked_for_once_and_before_the_first_scenario(events):
    assert checked(verify("--json").stdout)["run"] == RUNS
    (what, specs, jobs), *rest = events
    assert (what, jobs) == ("warmup", None)
    assert set(specs) == kernels_of(NAMES)
    assert len(specs) == RUNS  # none twice
    assert [event[0] for event in rest] == ["run"] * RUNS


def test_the_whole_table_takes_one_warmup(events):
    verify(pattern="*")
    assert [event[0] for event in events].count("warmup") == 1
    assert set(events[0][1]) == kernels_of("*")
    assert len(events[0][1]) < len(events) - 1  # scenarios share kernels


def test_weights_of_another_format_have_other_kernels_and_their_own_variants(events):
    verify("--weight-format", "mxfp4")
    readers = Variant.reading(MXFP4)
    assert set(events[0][1]) == kernels_of(NAMES, weights="mxfp4")
    assert {(spec.weights, spec.variant) for spec in events[0][1]} == {(MXFP4, variant) for variant in readers}
    assert len(events) == 1 + 3 * len(readers)
    events.clear()
    done = verify("--weight-format", "mxfp4", "--variant", "pingpong", code=2)
    assert "pingpong multiplies no weights of these scenarios" in done.stderr
    assert not events


def test_only_kernels_that_a_call_takes_are_compiled(events):
    verify("--variant", "cooperative")
    assert set(events[0][1]) == kernels_of(NAMES, (Variant.COOPERATIVE,))
    events.clear()
    verify("--variant", "auto", pattern="threshold.t255,threshold.t256")
    assert {spec.variant for spec in events[0][1]} == {Variant.PINGPONG, Variant.COOPERATIVE}
    events.clear()
    with override(variant="cooperative"):  # auto is what the settings say
        verify("--variant", "auto", pattern="L1.smoke")
    assert [spec.variant for spec in events[0][1]] == [Variant.COOPERATIVE]


def test_ranks_find_every_variant_compiled_by_their_parent(events, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    result = verify("--ranks", "2", "--variant", "pingpong", "--json", pattern="L1.smoke")
    assert checked(result.stdout)["run"] == 1
    assert events[1:] == [("ranks",)]
    assert set(events[0][1]) == kernels_of("L1.smoke", ranks=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_of_torchrun_shows_what_is_compiled(events, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with override(jobs=8):
        result = verify(pattern="L1.smoke")
    (what, specs, jobs), *rest = events
    assert (what, jobs, rest) == ("warmup", (None, 4)[rank], [("ranks",)])
    assert set(specs) <= kernels_of("L1.smoke", ranks=2)
    assert (
        result.stderr.count("megamoe_") == (len(Variant.reading(FP8)), 0)[rank]
    )  # each, though the first fails: other scenarios run


@pytest.mark.parametrize(("here", "gpus"), [({}, 1), ({"RANK": "0", "WORLD_SIZE": "2"}, 4)])
def test_nothing_is_compiled_for_ranks_that_cannot_start(events, monkeypatch, here, gpus):
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    verify("--ranks", "4", pattern="L1.smoke")
    assert events == [("ranks",)]


@pytest.mark.parametrize("setting", ["no_cache", "disable_jit"])
def test_without_a_cache_or_compiling_scenarios_run_straight_away(events, setting):
    with override(**{setting: True}):
        verify()
    assert [event[0] for event in events] == ["run"] * RUNS


@pytest.fixture
def layer(place, monkeypatch):
    """A layer that only gets its kernel, from a small kernel directory, whose folder this is."""

    def run_scenario(scenario, variant, *_, **__):
        get_kernel(KernelSpec(scenario.shape, Variant.parse(variant), numerics=scenario.numerics))
        return passed(scenario.name, variant)

    monkeypatch.setattr(_verify, "run_scenario", run_scenario)
    return place / "src"


def test_scenarios_compile_nothing_themselves_and_a_bad_kernel_fails_its_own(layer, compiles):
    (layer / "kernels/entry.cuh.j2").write_text(
        TEMPLATE + "{% if policy == 'Cooperative' %}\nint x = nonsense;\n{% endif %}\n"
    )
    result = verify("--json", code=1)
    outcomes = checked(result.stdout)["outcomes"]
    assert [(o["variant"], o["passed"]) for o in outcomes] == [
        (v.value, v is not Variant.COOPERATIVE) for v in Variant.reading(FP8)
    ] * 3
    assert all("CompileError" in o["reason"] and "nonsense" in o["reason"] for o in outcomes if not o["passed"])
    assert sorted(compiles) == sorted(spec.kernel_name for spec in kernels_of(NAMES))
    lines = [line.split()[0] for line in result.stderr.splitlines()]
    compiled = [line for line in lines if line in ("compiled", "failed")]
    assert sorted(compiled) == ["compiled"] * (RUNS - 3) + ["failed"] * 3
    assert [line for line in lines if line in ("compiled", "failed", "passed", "FAILED")] == [
        *compiled,
        *("FAILED" if v is Variant.COOPERATIVE else "passed" for _ in range(3) for v in Variant.reading(FP8)),
    ]


def test_without_a_compiler_each_scenario_says_so(layer, tmp_path):
    with override(nvrtc=tmp_path / "libnvrtc.so"):
        outcomes = checked(verify("--json", code=1).stdout)["outcomes"]
    assert ["ToolchainError" in o["reason"] for o in outcomes] == [True] * RUNS


def test_on_a_terminal_the_kernels_come_before_the_count(layer, monkeypatch):
    for module in (_io, _kernels):
        monkeypatch.setattr(module, "live_terminal", lambda: True)
    result = verify("--json", pattern="L1.smoke")
    assert checked(result.stdout)["run"] == len(Variant.reading(FP8))
    assert result.stderr.index(
        f"{len(Variant.reading(FP8))} of {len(Variant.reading(FP8))} done"
    ) < result.stderr.index("passed  L1.smoke  pingpong")
