"""What `bench` and `verify` do when several GPUs share the experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._io import cell, show, table
from megamoe_jit._text import counted

if TYPE_CHECKING:
    from megamoe_jit._bench.documents import Bench
    from megamoe_jit._check.documents import Outcome, Verify

run_ranks_option = click.option(
    "--ranks",
    type=click.IntRange(1, 8),
    help="GPUs of this host that share the experts; one process is started for each, unless torchrun has started "
    "them.  [default: torchrun's number, else 1]",
)


def rank_count(ranks: int | None) -> int:
    """The number of ranks that was asked for, or torchrun's."""
    from megamoe_jit._check.collect import joined

    here = joined()
    return ranks if ranks is not None else here[1] if here is not None else 1


def print_verify(doc: Verify, ranks: int) -> None:
    """The outcomes in one table, a line for each family of scenarios and one for all."""
    families: dict[str, list[Outcome]] = {}
    for outcome in doc.outcomes:
        families.setdefault(outcome.name.partition(".")[0], []).append(outcome)
    rows = []
    for family, outcomes in [*families.items(), ("all", list(doc.outcomes))]:
        failed = sum(not o.passed for o in outcomes)
        worst = (
            max((v for v in values if not math.isnan(v)), default=math.nan)
            for values in ([o.diff for o in outcomes], [o.worst_row_diff for o in outcomes])
        )
        figures = ("-" if math.isnan(v) else f"{v:.1e}" for v in worst)
        names = len({o.name for o in outcomes})
        rows.append((family, names, len(outcomes), len(outcomes) - failed, failed, *figures))
    late = f", each up to {doc.skew_us} us late for each launch" if doc.skew_us else ""
    show(f"{ranks} ranks, {counted(doc.rounds, 'round')} of each scenario and variant{late}")
    show(table(("FAMILY", "SCENARIOS", "RUN", "PASSED", "FAILED", "WORST DIFF", "WORST ROW"), rows))


def print_others(doc: Bench) -> None:
    """The ways to do the layer unfused, if they were timed."""
    others = [
        (
            b.shape,
            str(b.tokens),
            b.method,
            "graph" if b.graph else "eager",
            cell(b.median_us, ".1f"),
            cell(b.diff, ".1e", "" if b.correct else " WRONG"),
        )
        for b in doc.baselines or ()
    ]
    if others:
        show()
        show(table(("SHAPE", "TOKENS", "UNFUSED", "LAUNCHED", "MEDIAN us", "DIFF"), others, left=(0, 2, 3)))
    for method, reason in (doc.baselines_not_timed or {}).items():
        show(f"not timed: {method} ({reason})")
