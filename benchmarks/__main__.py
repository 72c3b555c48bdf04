"""What `megamoe-jit` measures, as the laboratory writes it down: with the commit, and held against other kernels.

    python -m benchmarks bench [OPTIONS]   # as `megamoe-jit bench`, with goals in table, document and plots
    python -m benchmarks tune [OPTIONS]    # as `megamoe-jit tune`

`make bench` is the first, with its document kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.checkout import commit
from benchmarks.goals import judged
from benchmarks.plots import draw
from megamoe_jit._bench.documents import Bench, JudgedRow, Summary
from megamoe_jit._cli import bench as own_bench
from megamoe_jit._cli import tune as own_tune
from megamoe_jit._cli.app import AnsweringGroup
from megamoe_jit._documents import plain


def _reached(row: JudgedRow) -> str:
    """The goals that the time as measured meets."""
    met = [goal for goal, time in (("must", row.must_us), ("aim", row.aim_us)) if time and row.median_us <= time]
    return "WRONG" if not row.correct else met[-1] if met else "-"


COLUMNS = {
    **own_bench.COLUMNS,
    "NORMALISED": own_bench.figure("normalised_us", 1),
    "x BEST KNOWN": own_bench.figure("vs_best_known", 2),
    "REACHES": _reached,
}


def summary_lines(summary: Sequence[Summary]) -> list[str]:
    """How the rows stand, a line for each variant, as measured and normalised."""
    lines = []
    for part in summary:
        words = [f"{part.variant}, {part.basis}:"]
        if part.rows:
            words.append(f"{part.faster or 0:.3f} times as fast as the best known (geometric mean of {part.rows}),")
            words.append(f"must {part.must_met} of {part.rows}, aim {part.aim_met} of {part.aim_rows};")
        if part.few_rows:
            words.append(f"below the table: aim {part.few_met} of {part.few_rows}")
        lines.append(" ".join(words).rstrip(",;"))
    return lines


def _bench(output: Path | None, picture: Path | None, as_json: bool, nodes: int, **what: Any) -> None:
    if nodes > 1:
        raise click.UsageError("--nodes is for megamoe-jit bench; no other kernel's figures are over several nodes.")
    for option in ("exchange", "partial", "chunks"):
        del what[option]
    own_bench.refuse_early(output, picture)
    found = own_bench.measured(**what, commit=commit())
    if found is not None:
        doc = Bench.of(judged(plain(found)))
        lines = summary_lines(doc.summary)
        own_bench.finish(doc, output, picture, as_json, columns=COLUMNS, lines=lines, draw=draw)


def _tune(**options: Any) -> None:
    click.get_current_context().invoke(own_tune.tune, **options, commit=commit())


def _like(own: click.Command, callback: Any) -> click.Command:
    return click.Command(own.name, params=own.params, callback=callback, help=own.help)


main = AnsweringGroup(
    "benchmarks",
    commands=[_like(own_bench.bench, _bench), _like(own_tune.tune, _tune)],
    help="What `megamoe-jit` measures, with the commit and held against other kernels.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
