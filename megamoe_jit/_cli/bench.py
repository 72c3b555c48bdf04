"""`megamoe-jit bench`: time the layer on this GPU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import (
    ExitCode,
    document,
    emit_json,
    json_option,
    must_be_writable,
    progress_line,
    say,
    show,
    table,
)
from megamoe_jit._cli._options import timed_shapes_option, timed_tokens_option
from megamoe_jit._cli._ranks import bench_document, print_bench, print_others, rank_count, run_ranks_option
from megamoe_jit._spec.variants import VARIANT_CHOICES

if TYPE_CHECKING:
    from megamoe_jit._bench.unfused_run import BaselineRow
    from megamoe_jit._check.scenarios import Scenario

__all__ = ["bench"]

_HEADERS = (
    "SHAPE",
    "VARIANT",
    "KERNEL",
    "TOKENS",
    "MEDIAN us",
    "MIN",
    "MAX",
    "STAGED",
    "SUSTAINED",
    "NORMALISED",
    "TFLOPS",
    "WEIGHTS TB/s",
    "x BEST KNOWN",
    "% OF LIMIT",
    "REACHES",
    "DIFF",
)


def _reached(row: dict[str, Any]) -> str:
    """The goals that the time as measured meets."""
    met = [goal for goal in ("must", "aim") if row[f"{goal}_us"] and row["median_us"] <= row[f"{goal}_us"]]
    return "WRONG" if not row["correct"] else met[-1] if met else "-"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def figure(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else f"{value * factor:.{digits}f}"

    times = ("median_us", "min_us", "max_us", "staged_us", "sustained_us", "normalised_us")
    return (
        row["shape"],
        row["variant"],
        row["kernel"],
        str(row["tokens"]),
        *(figure(row[key], 1) for key in times),
        f"{row['tflops']:.0f}",
        f"{row['weights_tb_s']:.2f}",
        figure(row["vs_best_known"], 2),
        figure(row["limit_share"], 0, 100),
        _reached(row),
        f"{row['diff']:.1e}" if row["correct"] else "WRONG",
    )


def _print_card(anchors: Sequence[dict[str, float]]) -> None:
    last = len(anchors) - 1
    for number, anchor in enumerate(anchors):
        when = "before" if number == 0 else "after" if number == last else "between"
        show(
            f"card {when}: dense FP8 8192^3 {anchor['dense_fp8_8192_tflops']:.0f} TFLOPS, "
            f"read {anchor['read_4gib_tb_s']:.2f} TB/s"
        )


def _print_summary(doc: dict[str, Any]) -> None:
    for part in doc.get("summary", ()):
        words = [f"{part['variant']}, {part['basis']}:"]
        if part["rows"]:
            words.append(
                f"{part['faster'] or 0:.3f} times as fast as the best known (geometric mean of {part['rows']}),"
            )
            words.append(f"must {part['must_met']} of {part['rows']}, aim {part['aim_met']} of {part['aim_rows']};")
        if part["few_rows"]:
            words.append(f"below the table: aim {part['few_met']} of {part['few_rows']}")
        show(" ".join(words).rstrip(",;"))
    choice = doc.get("choice")
    if choice:
        show(
            f"automatic choice: within 3 % of the best variant on {choice['close']} of {choice['rows']} rows, "
            f"worst {choice['worst']:.3f} times its time ({choice['shape']}, {choice['tokens']} tokens)"
        )


def _on_one(work: Sequence[Scenario], variants: Sequence[str], baseline: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from megamoe_jit._bench import conditions as _bench_report
    from megamoe_jit._bench import measure as _bench

    device = _bench.require_hopper()
    conditions = _bench_report.environment()
    say("{device}, driver {driver}, NVRTC {nvrtc}, {commit}".format(**conditions))
    others: list[BaselineRow] = []
    card, not_timed = [_bench.anchors()], None
    if baseline:
        from megamoe_jit._bench.unfused_run import unusable

        say("trying other ways to do the layer; a library that compiles its kernels on first use may take minutes")
        not_timed = unusable(device)
    with progress_line("bench", len(work) * len(variants)) as step:
        measured = _bench.measure(
            work,
            variants,
            lambda r: step(f"{r.shape}  {r.tokens} tokens  {r.variant}: {r.median_us:.1f} us"),
            between=lambda: card.append(_bench.anchors()),
            not_timed=not_timed,
            baselines=others,
        )
    card.append(_bench.anchors())
    doc = document("bench", environment=conditions, anchors=card, rows=[row.to_json() for row in measured])
    if not_timed is not None:
        doc["baselines"] = [asdict(other) for other in others]
        doc["baselines_not_timed"] = {name: reason for name, reason in not_timed.items() if reason}
    return doc


def _judged(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with its rows held against what is known."""
    from megamoe_jit._bench import goals as _bench_known

    device = doc["environment"]["device"]
    rows = _bench_known.annotate(doc["rows"], device, doc["anchors"], _bench_known.load())
    return {
        **doc,
        "rows": rows,
        "summary": _bench_known.summarise(rows),
        "choice": _bench_known.choice_quality(rows),
    }


def _refuse_early(output: Path | None, picture: Path | None) -> None:
    """Find out before anything is measured what would go wrong after it."""
    if output is not None:
        if output.suffix not in (".json", ".csv"):
            raise click.BadParameter("the name must end in .json or .csv", param_hint="--output")
        must_be_writable(output, "--output")
    if picture is not None:
        must_be_writable(picture, "--plot", in_new_folders=True)
        importlib.import_module("matplotlib")


def _print(doc: dict[str, Any], ranks: int, as_json: bool) -> None:
    if as_json:
        emit_json(doc)
        return
    if ranks > 1:
        print_bench(doc)
    else:
        show(table(_HEADERS, [_cells(row) for row in doc["rows"]], left=(0, 1, 2)))
        print_others(doc)
    _print_card(doc["anchors"])
    _print_summary(doc)


def _keep(doc: dict[str, Any], output: Path | None, picture: Path | None) -> None:
    if output is not None:
        from megamoe_jit._bench import conditions as _bench_report

        _bench_report.write(doc, output)
        say(f"written: {output}")
    if picture is not None:
        from megamoe_jit._bench.plot import draw

        for drawn in draw(doc, picture):
            say(f"drawn: {drawn}")


@click.command()
@timed_shapes_option
@timed_tokens_option("16,64,256,512,1024,4096,8192; on one GPU 1,2,4,8,32 too for v4-flash and v4-pro")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(VARIANT_CHOICES),
    help="Variant to time; may be given more than once.  [default: all, taking turns]",
)
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
@run_ranks_option
@click.option(
    "--baseline/--no-baseline",
    default=None,
    help="Time the layer in several launches in turn with it: torch, DeepGEMM, FlashInfer, as installed.  "
    "[default: with several ranks only]",
)
@json_option
def bench(
    names: str,
    tokens: tuple[int, ...] | None,
    variants: tuple[str, ...],
    ranks: int | None,
    baseline: bool | None,
    output: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Time the layer on this GPU, output checked first.

    Exit code 0, 1 if an output is wrong, 3 without a Hopper GPU.
    """
    _refuse_early(output, picture)
    from megamoe_jit._device.driver import refuse_without_gpu
    from megamoe_jit.heuristics.presets import parse_shapes

    presets = parse_shapes(names)
    refuse_without_gpu()
    from megamoe_jit._bench import measure as _bench

    wanted, several = variants or _bench.VARIANTS, rank_count(ranks)
    if several > 1:
        found = bench_document(presets, tokens or _bench.DEFAULT_TOKENS, wanted, several, baseline is not False)
        if found is None:
            return
    else:
        work = _bench.cases(presets, tokens) if tokens else _bench.default_cases(presets)
        found = _on_one(work, wanted, bool(baseline))
    doc = _judged(found)
    rows = doc["rows"]
    try:
        _print(doc, several, as_json)
    finally:  # what was measured is kept even if nobody reads what is printed
        _keep(doc, output, picture)
    wrong = sum(not row["correct"] for row in rows)
    if wrong:
        say(f"{wrong} of {len(rows)} rows differ from the reference")
        raise click.exceptions.Exit(ExitCode.FAILED)
