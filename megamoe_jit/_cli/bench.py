"""`megamoe-jit bench`: time the layer on this GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import ExitCode, document, emit_json, json_option, progress_line, say, table
from megamoe_jit._cli._ranks import bench_document, print_bench, rank_count, run_ranks_option

if TYPE_CHECKING:
    from megamoe_jit.heuristics.presets import Preset

__all__ = ["bench"]

_HEADERS = (
    "SHAPE",
    "VARIANT",
    "KERNEL",
    "TOKENS",
    "MEDIAN us",
    "MIN",
    "MAX",
    "SUSTAINED us",
    "TFLOPS",
    "WEIGHTS TB/s",
    "x BEST KNOWN",
    "x LIMIT",
    "DIFF",
)


def _integers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers separated by commas") from None
    if not all(value > 0 for value in values):
        raise click.BadParameter("token counts are 1 or more")
    return values


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    times = (f"{row[key]:.1f}" for key in ("median_us", "min_us", "max_us", "sustained_us"))
    return (
        row["shape"],
        row["variant"],
        row["kernel"],
        str(row["tokens"]),
        *times,
        f"{row['tflops']:.0f}",
        f"{row['weights_tb_s']:.2f}",
        ratio(row["vs_best_known"]),
        ratio(row["vs_limit"]),
        f"{row['diff']:.1e}" if row["correct"] else "WRONG",
    )


def _on_one(presets: Sequence[Preset], tokens: Sequence[int], variants: Sequence[str]) -> dict[str, Any]:
    from megamoe_jit import _bench, _bench_report

    work = _bench.cases(presets, tokens)
    _bench.require_hopper()
    conditions = _bench_report.environment()
    say("{device}, driver {driver}, NVRTC {nvrtc}, {commit}".format(**conditions))
    card = [_bench.anchors()]
    with progress_line("bench", len(work) * len(variants)) as step:
        measured = _bench.measure(
            work,
            variants,
            lambda r: step(f"{r.shape}  {r.tokens} tokens  {r.variant}: {r.median_us:.1f} us"),
        )
    card.append(_bench.anchors())
    known = _bench_report.targets()
    rows = [{**row.to_json(), **_bench_report.compare(row.to_json(), conditions["device"], known)} for row in measured]
    return document("bench", environment=conditions, anchors=card, rows=rows)


@click.command()
@click.option(
    "--shapes",
    "names",
    metavar="NAME[,NAME...]",
    help="Shapes, each with the experts of one of its ranks.  [default: v4-flash,v4-pro,mimo-v2.5,mimo-v2.5-pro]",
)
@click.option(
    "--tokens",
    callback=_integers,
    metavar="N[,N...]",
    help="Token counts.  [default: 16,64,256,512,1024,4096,8192]",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(["auto", "pingpong", "cooperative"]),
    help="Variant to time; may be given more than once.  [default: all three, taking turns]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the result to a .json or .csv file.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also draw time over tokens; needs the [bench] extra.",
)
@run_ranks_option
@click.option("--baseline/--no-baseline", default=True, help="With several ranks: time an unfused layer beside it.")
@json_option
def bench(
    names: str | None,
    tokens: tuple[int, ...] | None,
    variants: tuple[str, ...],
    ranks: int | None,
    baseline: bool,
    output: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Time the layer on this GPU, output checked first.

    Exit code 0, 1 if an output is wrong, 3 without a Hopper GPU.
    """
    if output is not None and output.suffix not in (".json", ".csv"):
        raise click.BadParameter("the name must end in .json or .csv", param_hint="--output")
    from megamoe_jit import _bench, _bench_report
    from megamoe_jit.heuristics.presets import parse_shapes

    presets = parse_shapes(names if names is not None else ",".join(_bench.DEFAULT_SHAPES))
    counts, wanted, several = tokens or _bench.DEFAULT_TOKENS, variants or _bench.VARIANTS, rank_count(ranks)
    doc = (
        bench_document(presets, counts, wanted, several, baseline) if several > 1 else _on_one(presets, counts, wanted)
    )
    if doc is None:
        return
    rows, card = doc["rows"], doc["anchors"]
    if output is not None:
        _bench_report.write(doc, output)
        say(f"written: {output}")
    if picture is not None:
        _bench_report.plot(doc, picture)
        say(f"drawn: {picture}")
    if as_json:
        emit_json(doc)
    else:
        if several > 1:
            print_bench(doc)
        else:
            click.echo(table(_HEADERS, [_cells(row) for row in rows], left=(0, 1, 2)))
        for when, anchor in zip(("before", "after"), card, strict=True):
            click.echo(
                f"card {when}: dense FP8 8192^3 {anchor['dense_fp8_8192_tflops']:.0f} TFLOPS, "
                f"read {anchor['read_4gib_tb_s']:.2f} TB/s"
            )
    wrong = sum(not row["correct"] for row in rows)
    if wrong:
        say(f"{wrong} of {len(rows)} rows differ from the reference")
        raise click.exceptions.Exit(ExitCode.FAILED)
