"""What the JSON documents of `verify` say, and the outcome of one scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megamoe_jit._documents import Count, Document, Measured
from megamoe_jit._spec import FP8


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one scenario with one variant.

    Attributes:
        name: of the scenario
        variant: as asked for
        diff: of all rows to the reference
        zero_rows_ok: whether rows that must be zero are
        reason: why it did not pass
        weights: the format that they are stored in
    """

    name: str
    variant: str
    diff: Measured
    worst_row_diff: Measured
    zero_rows_ok: bool
    passed: bool
    reason: str
    weights: str = FP8.name

    def also(self, problem: str) -> Outcome:
        """The same with something else that is wrong."""
        return replace(self, passed=False, reason="; ".join(filter(None, (self.reason, problem))))


@dataclass(frozen=True, slots=True)
class Verify(Document):
    """Scenarios compared with the reference.

    Attributes:
        rounds: times that each was run, with inputs of each time
        skew_us: microseconds that a rank was late for a launch at most
        run: scenarios with the variants that multiply their weights
    """

    KIND = "verify"

    scenarios: Count
    rounds: Count
    skew_us: Count
    run: Count
    not_run: Count
    failed: Count
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], scenarios: int, wanted: int, rounds: int = 1, skew_us: int = 0) -> Verify:
        """With the outcomes counted.

        Args:
            outcomes: of what was run.
            scenarios: that were chosen.
            wanted: runs of these with variants.
            rounds: how often.
            skew_us: how late a rank may have been for a launch.
        """
        failed = sum(not outcome.passed for outcome in outcomes)
        left = wanted - len(outcomes)
        return cls(scenarios, rounds, skew_us, len(outcomes), left, failed, tuple(outcomes))


@dataclass(frozen=True, slots=True)
class Scenarios(Document):
    """Scenarios that `verify` would run."""

    KIND = "scenarios"

    scenarios: tuple[str, ...]
