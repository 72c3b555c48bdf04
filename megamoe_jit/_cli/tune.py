"""`megamoe-jit tune`: measure the run-time choices of a call, and write them down as a table of heuristics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import ExitCode, emit, end, json_option, must_be_writable, progress_line, say, show, table
from megamoe_jit._cli._options import (
    named_shapes,
    number_list,
    timed_shapes_option,
    timed_tokens_option,
    variants_option,
)
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.formats import FP8
from megamoe_jit._spec.variants import Variant
from megamoe_jit._text import counted

if TYPE_CHECKING:
    from megamoe_jit._bench.documents import Cell, Time


def _best(cell: Cell) -> Time | None:
    return min((time for time in cell.times if time.correct), key=lambda time: time.median_us, default=None)


def _way(time: Time | None) -> str:
    if time is None:
        return "all WRONG"
    return f"{time.variant}, lag {time.lag:g}, rows {time.rows_per_item}"


def _row(cell: Cell) -> tuple[str, ...]:
    best = _best(cell)
    each = []
    for variant in dict.fromkeys(time.variant for time in cell.times):
        mine = [time.median_us for time in cell.times if time.variant == variant and time.correct]
        each.append(f"{variant} {min(mine):.1f}" if mine else f"{variant} WRONG")
    return cell.name, str(cell.tokens), _way(best), f"{best.median_us:.1f}" if best else "-", ", ".join(each)


def _refuse_early(data: Path, measure: bool, target: Path | None, write_table: bool) -> None:
    """Find out before anything is measured what would go wrong after it."""
    if measure:
        must_be_writable(data, "--data")
    elif not data.exists():
        raise ConfigError(f"--data {data} does not exist; allowed: a file that `megamoe-jit tune` has written")
    if write_table:
        from megamoe_jit.heuristics.tables import FOLDER

        must_be_writable(target or FOLDER, "--table", in_new_folders=True)


@click.command()
@timed_shapes_option
@timed_tokens_option("19 counts from 1 to 8192")
@variants_option(
    "Kernel to compare; may be given more than once.  [default: all]",
    [variant.value for variant in Variant.reading(FP8)],
)
@click.option(
    "--lags",
    callback=number_list(float),
    metavar="X[,X...]",
    help="Lags to compare: tiles of the first GEMM per SM, up to 64.  [default: 1,2,4]",
)
@click.option(
    "--rows",
    callback=number_list(int),
    metavar="N[,N...]",
    help="Rows per item to compare, of 1, 2, 4 and 8.  [default: 1,4,8]",
)
@click.option(
    "--data",
    default="tuning.jsonl",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where measurements are appended, and read by a later run.",
)
@click.option("--force", is_flag=True, help="Measure again what the file already has.")
@click.option("--measure/--no-measure", default=True, help="Without measuring, the file as it is; needs no GPU.")
@click.option("--write-table", is_flag=True, help="Condense all of the file into the table of its GPU.")
@click.option(
    "--table",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the table.  [default: heuristics/tables/GPU.json of this package]",
)
@json_option
def tune(
    names: str,
    tokens: tuple[int, ...] | None,
    variants: tuple[str, ...],
    lags: tuple[float, ...] | None,
    rows: tuple[int, ...] | None,
    data: Path,
    force: bool,
    measure: bool,
    write_table: bool,
    target: Path | None,
    as_json: bool,
    commit: str | None = None,
) -> None:
    """Measure which variant and parameters are fastest on this GPU, outputs checked first; resumable.

    Exit code 0, 1 if an output is wrong, 3 without a Hopper GPU.
    """
    _refuse_early(data, measure, target, write_table)
    from megamoe_jit.heuristics.tables import check_choices

    presets = named_shapes(names)
    check_choices(lags or (), rows or ())
    if measure:
        from megamoe_jit._device.driver import refuse_without_gpu

        refuse_without_gpu()
    from megamoe_jit._bench import tune as _tune
    from megamoe_jit._bench import tune_table as _tune_table
    from megamoe_jit._bench.documents import Cell, Tune

    counts = tokens or _tune.DEFAULT_TOKENS
    measured = 0

    def finished(data: Mapping[str, Any], now: bool) -> None:
        nonlocal measured
        measured += now
        cell = Cell.of(data)
        step(f"{cell.name}  {counted(cell.tokens, 'token')}: {_way(_best(cell))}{'' if now else ' (measured before)'}")

    if measure:
        with progress_line("tune", len(presets) * len(counts)) as step:
            found = _tune.tune(
                presets,
                data,
                counts,
                variants=[Variant.parse(name) for name in variants] or Variant.reading(FP8),
                lags=lags or _tune.DEFAULT_LAGS,
                rows_per_item=rows or _tune.DEFAULT_ROWS,
                force=force,
                commit=commit,
                progress=finished,
            )
    else:
        found = _tune.read(data)
    cells = tuple(map(Cell.of, found))
    if not as_json:
        show(table(("SHAPE", "TOKENS", "BEST", "us", "BY VARIANT"), [_row(c) for c in cells], left=(0, 2, 4)))
    written = _tune_table.write_table(_tune.read(data), target) if write_table else None
    wrong = sum(not time.correct for cell in cells for time in cell.times)
    if as_json:
        table_path = None if written is None else str(written)
        emit(Tune(str(data), measured, wrong, table_path, cells))
    if written is not None:
        say(f"written: {written}")
    if wrong:
        say(f"{wrong} outputs differ from the reference")
        end(ExitCode.FAILED)
