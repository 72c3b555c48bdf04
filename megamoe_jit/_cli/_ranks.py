"""What `bench` and `verify` do when several GPUs share the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import progress_line, show, table
from megamoe_jit._spec.formats import FP8

if TYPE_CHECKING:
    from megamoe_jit._bench.documents import Bench, JudgedRow
    from megamoe_jit.heuristics.presets import Preset

__all__ = ["bench_document", "print_bench", "print_others", "rank_count", "run_ranks_option"]

_HEADERS = (
    "SHAPE",
    "VARIANT",
    "KERNEL",
    "TOKENS",
    "MEDIAN us",
    "MIN",
    "MAX",
    "SUSTAINED us",
    "ONE RANK us",
    "x ONE RANK",
    "UNFUSED us",
    "TIMES FASTER",
    "DIFF",
)

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


def bench_document(
    presets: Sequence[Preset],
    tokens: Sequence[int],
    variants: Sequence[str],
    ranks: int,
    baseline: bool,
    weights: str = FP8.name,
) -> dict[str, Any] | None:
    """What a benchmark on several GPUs found; None where torchrun runs another rank that reports."""
    from megamoe_jit._bench.measure_ranks import run

    with progress_line("bench", len(presets) * len(tokens) * len(variants)) as step:
        return run(
            presets,
            tokens,
            variants,
            ranks,
            baseline=baseline,
            weights=weights,
            progress=lambda r: step(f"{r['shape']}  {r['tokens']} tokens  {r['variant']}: {r['median_us']:.1f} us"),
        )


def _cells(row: JudgedRow) -> tuple[str, ...]:
    def figure(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    times = (figure(time, 1) for time in (row.median_us, row.min_us, row.max_us, row.sustained_us, row.one_rank_us))
    return (
        row.shape,
        row.variant,
        row.kernel,
        str(row.tokens),
        *times,
        figure(row.vs_one_rank, 3),
        figure(row.baseline_us, 1),
        figure(row.baseline_speedup, 2),
        f"{row.diff:.1e}" if row.correct else "WRONG",
    )


def print_bench(doc: Bench) -> None:
    """The document as tables."""
    show(table(_HEADERS, [_cells(row) for row in doc.rows], left=(0, 1, 2)))
    print_others(doc)


def print_others(doc: Bench) -> None:
    """The ways to do the layer unfused, if they were timed."""
    others = [
        (
            b.shape,
            str(b.tokens),
            b.method,
            "graph" if b.graph else "eager",
            "-" if b.median_us is None else f"{b.median_us:.1f}",
            "-" if b.diff is None else f"{b.diff:.1e}" + ("" if b.correct else " WRONG"),
        )
        for b in doc.baselines or ()
    ]
    if others:
        show()
        show(table(("SHAPE", "TOKENS", "UNFUSED", "LAUNCHED", "MEDIAN us", "DIFF"), others, left=(0, 2, 3)))
    for method, reason in (doc.baselines_not_timed or {}).items():
        show(f"not timed: {method} ({reason})")
