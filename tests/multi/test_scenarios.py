"""Single calls on all ranks, judged on each against an oracle over all ranks' experts."""

import pytest

from megamoe_jit._check.scenarios import SCENARIOS
from megamoe_jit._spec.inputs import Inputs
from tests.multi import checks_scenarios
from tests.multi.harness import run_checks, warm
from tests.multi.worker import shape_for

SHAPES = {s.name: s.shape for s in SCENARIOS}
TABLE = [name for name in checks_scenarios.CHECKS if name in SHAPES]
OTHERS = [name for name in checks_scenarios.CHECKS if name not in SHAPES]


@pytest.fixture(scope="module")
def table(ranks):
    chosen = [s for s in SCENARIOS if s.shape.experts % ranks == 0]
    warm([s.shape for s in chosen], ranks, inputs=tuple(Inputs))
    warm([s.shape for s in chosen if not s.fast_math], ranks, (False,), tuple(Inputs))
    known = {s.name for s in chosen}
    names = [name for name in TABLE if name in known]
    return run_checks("tests.multi.checks_scenarios", names, ranks, timeout_s=900)


@pytest.fixture(scope="module")
def others(ranks):
    warm([shape_for(ranks, *checks_scenarios.SIZES)], ranks, inputs=tuple(Inputs))
    return run_checks("tests.multi.checks_scenarios", OTHERS, ranks, timeout_s=300)


@pytest.mark.parametrize("name", TABLE)
def test_a_scenario_of_the_table(table, ranks, name):
    if SHAPES[name].experts % ranks:
        pytest.skip(f"{SHAPES[name].experts} experts cannot be shared evenly by {ranks} ranks")
    assert table[name] == ""


@pytest.mark.parametrize("name", OTHERS)
def test_ragged_counts_and_routes_between_ranks(others, name):
    assert others[name] == ""
