"""`megamoe-jit bench`: time the layer on this GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._bench_nodes import measured_on_nodes, print_nodes, refuse_with_nodes
from megamoe_jit._cli._io import (
    ExitCode,
    cell,
    emit,
    end,
    json_option,
    must_be_writable,
    progress_line,
    say,
    show,
    table,
)
from megamoe_jit._cli._nodes import nodes_options
from megamoe_jit._cli._options import (
    named_shapes,
    rank_count,
    run_ranks_option,
    timed_shapes_option,
    timed_tokens_option,
    variants_option,
    weight_format_option,
)
from megamoe_jit._documents import content, plain
from megamoe_jit._spec.formats import FP8
from megamoe_jit._spec.variants import VARIANT_CHOICES
from megamoe_jit._text import counted

if TYPE_CHECKING:
    from megamoe_jit._bench.documents import BaselineRow, Bench, Choice, JudgedRow
    from megamoe_jit._check.scenarios import Scenario
    from megamoe_jit._diagnose.between import Ways

Columns = Mapping[str, Callable[["JudgedRow"], str]]
Draw = Callable[[Mapping[str, Any], Path], Sequence[Path]]


def figure(field: str, digits: int, factor: float = 1.0) -> Callable[[JudgedRow], str]:
    """What makes the cell of a number, which may be missing."""

    def text(row: JudgedRow) -> str:
        value = getattr(row, field)
        return cell(None if value is None else value * factor, f".{digits}f")

    return text


#: Of the table for one GPU: headers, and what each makes of a row; the first three are words.
COLUMNS: Columns = {
    "SHAPE": lambda row: str(row.shape) if row.weights == FP8.name else f"{row.shape} {row.weights}",
    "VARIANT": lambda row: str(row.variant),
    "KERNEL": lambda row: str(row.kernel),
    "TOKENS": lambda row: str(row.tokens),
    "MEDIAN us": figure("median_us", 1),
    "MIN": figure("min_us", 1),
    "MAX": figure("max_us", 1),
    "STAGED": figure("staged_us", 1),
    "SUSTAINED": figure("sustained_us", 1),
    "TFLOPS": figure("tflops", 0),
    "WEIGHTS TB/s": figure("weights_tb_s", 2),
    "% OF LIMIT": figure("limit_share", 0, 100),
    "DIFF": lambda row: f"{row.diff:.1e}" if row.correct else "WRONG",
}
#: The same for several GPUs.
COLUMNS_OF_RANKS: Columns = {
    **{name: COLUMNS[name] for name in ("SHAPE", "VARIANT", "KERNEL", "TOKENS", "MEDIAN us", "MIN", "MAX")},
    "SUSTAINED us": figure("sustained_us", 1),
    "ONE RANK us": figure("one_rank_us", 1),
    "x ONE RANK": figure("vs_one_rank", 3),
    "UNFUSED us": figure("baseline_us", 1),
    "TIMES FASTER": figure("baseline_speedup", 2),
    "DIFF": COLUMNS["DIFF"],
}


def _show_others(doc: Bench) -> None:
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


def _print_card(anchors: Sequence[dict[str, float]]) -> None:
    last = len(anchors) - 1
    for number, anchor in enumerate(anchors):
        when = "before" if number == 0 else "after" if number == last else "between"
        show(
            f"card {when}: dense FP8 8192^3 {anchor['dense_fp8_8192_tflops']:.0f} TFLOPS, "
            f"read {anchor['read_4gib_tb_s']:.2f} TB/s"
        )


def _print_choice(choice: Choice | None) -> None:
    if choice:
        show(
            f"automatic choice: within 3 % of the best variant on {choice.close} of {choice.rows} rows, "
            f"worst {choice.worst:.3f} times its time ({choice.shape}, {counted(choice.tokens, 'token')})"
        )


def _on_one(work: Sequence[Scenario], variants: Sequence[str], baseline: bool, commit: str | None) -> dict[str, Any]:
    """The fields of the document that are measured."""
    from dataclasses import asdict

    from megamoe_jit._bench.clock import anchors
    from megamoe_jit._bench.conditions import environment
    from megamoe_jit._bench.measure import measure, require_hopper

    device = require_hopper()
    conditions = environment(commit)
    say("{device}, driver {driver}, NVRTC {nvrtc}, {commit}".format(**conditions))
    others: list[BaselineRow] = []
    card, not_timed = [anchors()], None
    if baseline:
        from megamoe_jit._bench.unfused_run import unusable

        say("trying other ways to do the layer; a library that compiles its kernels on first use may take minutes")
        not_timed = unusable(device)
    with progress_line("bench", sum(len(case.runs(variants)) for case in work)) as step:
        rows = measure(
            work,
            variants,
            lambda r: step(f"{r.shape}  {counted(r.tokens, 'token')}  {r.variant}: {r.median_us:.1f} us"),
            between=lambda: card.append(anchors()),
            not_timed=not_timed,
            baselines=others,
        )
    card.append(anchors())
    doc = {"environment": conditions, "anchors": card, "rows": [content(row) for row in rows]}
    if not_timed is not None:
        doc["baselines"] = [asdict(other) for other in others]
        doc["baselines_not_timed"] = {name: reason for name, reason in not_timed.items() if reason}
    return doc


def measured(
    names: str,
    tokens: Sequence[int] | None,
    variants: Sequence[str],
    ranks: int | None,
    baseline: bool | None,
    commit: str | None = None,
    weights: str = FP8.name,
) -> Bench | None:
    """The document of what the options of `bench` ask for, measured now.

    Args:
        names: of shapes.
        tokens: counts; None for those of each shape.
        variants: all if there are none.
        ranks: GPUs; None for torchrun's number, else one.
        baseline: time the layer unfused too; None for with several ranks only.
        commit: of the sources that are measured, where somebody knows it.
        weights: the format of the weights.

    Returns:
        With its rows held against the card's limit; None where torchrun runs another rank that reports.
    """
    from megamoe_jit._device.driver import refuse_without_gpu

    presets = named_shapes(names, weights)
    refuse_without_gpu()
    from megamoe_jit._bench.derived import add_limits, choice_quality
    from megamoe_jit._bench.documents import Bench
    from megamoe_jit._bench.measure import DEFAULT_TOKENS, cases, default_cases

    wanted, several = variants or VARIANT_CHOICES, rank_count(ranks)
    if several > 1:
        from megamoe_jit._bench.measure_ranks import run

        counts = tokens or DEFAULT_TOKENS
        with progress_line("bench", len(presets) * len(counts) * len(wanted)) as step:
            found = run(
                presets,
                counts,
                wanted,
                several,
                baseline=baseline is not False,
                weights=weights,
                progress=lambda r: step(
                    f"{r['shape']}  {counted(r['tokens'], 'token')}  {r['variant']}: {r['median_us']:.1f} us"
                ),
            )
        if found is None:
            return None
        if commit is not None:
            found["environment"]["commit"] = commit
    else:
        work = cases(presets, tokens, weights) if tokens else default_cases(presets, weights)
        found = _on_one(work, wanted, bool(baseline), commit)
    rows = add_limits(found["rows"], found["environment"]["device"])
    return Bench.of({**found, "rows": rows, "summary": [], "choice": choice_quality(rows)})


def refuse_early(output: Path | None, picture: Path | None) -> None:
    """Find out before anything is measured what would go wrong after it."""
    if output is not None:
        if output.suffix not in (".json", ".csv"):
            raise click.BadParameter("the name must end in .json or .csv", param_hint="--output")
        must_be_writable(output, "--output")
    if picture is not None:
        must_be_writable(picture, "--plot", in_new_folders=True)
        importlib.import_module("matplotlib")


def _print(doc: Bench, as_json: bool, columns: Columns, lines: Sequence[str]) -> None:
    if as_json:
        emit(doc)
        return
    if doc.nodes is not None:
        print_nodes(doc.nodes)
        return
    if doc.environment.get("ranks", 1) > 1:
        columns = COLUMNS_OF_RANKS
    cells = [[column(row) for column in columns.values()] for row in doc.rows]
    show(table(list(columns), cells, left=(0, 1, 2)))
    _show_others(doc)
    _print_card(doc.anchors)
    for line in lines:
        show(line)
    _print_choice(doc.choice)


def _keep(doc: Bench, output: Path | None, picture: Path | None, draw: Draw | None) -> None:
    if output is not None:
        from megamoe_jit._bench.conditions import write

        write(plain(doc), output)
        say(f"written: {output}")
    if picture is not None:
        from megamoe_jit._bench import plot

        for drawn in (draw or plot.draw)(plain(doc), picture):
            say(f"drawn: {drawn}")


def finish(
    doc: Bench,
    output: Path | None,
    picture: Path | None,
    as_json: bool,
    *,
    columns: Columns = COLUMNS,
    lines: Sequence[str] = (),
    draw: Draw | None = None,
) -> None:
    """Print a document, keep it, and end the command.

    Args:
        doc: of `measured`.
        output: file to write.
        picture: folder of plots.
        as_json: print the document itself.
        columns: of the table for one GPU.
        lines: to print below it.
        draw: the plots, if not those of `_bench.plot`.

    Raises:
        click.exceptions.Exit: an output is wrong.
    """
    try:
        _print(doc, as_json, columns, lines)
    finally:  # what was measured is kept even if nobody reads what is printed
        _keep(doc, output, picture, draw)
    rows = doc.rows if doc.nodes is None else doc.nodes
    wrong = sum(not row.correct for row in rows)
    if wrong:
        say(f"{wrong} of {len(rows)} rows differ from the reference")
        end(ExitCode.FAILED)


@click.command()
@timed_shapes_option
@timed_tokens_option("16,64,256,512,1024,4096,8192; on one GPU 1,2,4,8,32 too for v4-flash and v4-pro")
@variants_option("Variant to time; may be given more than once.  [default: all, taking turns]")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the result to a .json or .csv file.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also draw time and share of the limit over tokens into a directory; needs the [bench] extra.",
)
@weight_format_option("The format of the weights.")
@run_ranks_option
@nodes_options
@click.option(
    "--baseline/--no-baseline",
    default=None,
    help="Time the layer in several launches in turn with it: torch, DeepGEMM, FlashInfer, as installed.  "
    "[default: with several ranks only]",
)
@json_option
def bench(output: Path | None, picture: Path | None, as_json: bool, ways: Ways, **what: Any) -> None:
    """Time the layer on this GPU, output checked first.

    With --nodes: the whole call and its parts on nodes of --ranks GPUs each, the slowest rank of all; GPUs of this host
    play them, unless torchrun has started ranks on several. Exit code 0, 1 if an output is wrong, 3 without a Hopper
    GPU.
    """
    refuse_early(output, picture)
    if ways.nodes > 1:
        refuse_with_nodes(picture, what.pop("variants"))
        doc = measured_on_nodes(ways, **what)
    else:
        doc = measured(**what)
    if doc is not None:
        finish(doc, output, picture, as_json)
