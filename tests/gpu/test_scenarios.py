"""Every scenario of the table with every variant, through the public interface."""

import pytest

from megamoe_jit._check.scenarios import SCENARIOS, Scenario
from megamoe_jit._check.verify import run_scenario
from tests.gpu.harness import VARIANTS


def _by_shape(scenarios: tuple[Scenario, ...]) -> list[Scenario]:
    first: dict[object, int] = {}
    for i, s in enumerate(scenarios):
        first.setdefault((s.shape.hidden, s.shape.intermediate, s.shape.experts), i)
    return sorted(scenarios, key=lambda s: first[s.shape.hidden, s.shape.intermediate, s.shape.experts])


@pytest.mark.parametrize(
    ("scenario", "variant"),
    [
        pytest.param(s, variant, id=f"{s.name}-{variant}", marks=[pytest.mark.slow] if s.slow else [])
        for s in _by_shape(SCENARIOS)
        for variant in s.runs((*VARIANTS, *(["auto"] if s.family in ("threshold", "tokens", "mxfp4") else [])))
    ],
)
def test_scenario(scenario, variant, device, weights):
    outcome = run_scenario(scenario, variant, device, cache=weights)
    assert outcome.passed, outcome.reason
