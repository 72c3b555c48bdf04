"""Many calls on all ranks: soak, stalls, graphs, several buffers, counters."""

import pytest

from tests.multi import checks_rounds, checks_scenarios
from tests.multi.harness import run_checks, warm
from tests.multi.worker import shape_for


@pytest.fixture(scope="module")
def results(ranks):
    sizes = (checks_scenarios.SIZES, checks_rounds.OTHER, checks_rounds.UNPREPARED)
    warm([shape_for(ranks, *each) for each in sizes], ranks)
    return run_checks("tests.multi.checks_rounds", list(checks_rounds.CHECKS), ranks, timeout_s=400)


@pytest.mark.parametrize("name", list(checks_rounds.CHECKS))
def test_many_calls(results, name):
    assert results[name] == ""
