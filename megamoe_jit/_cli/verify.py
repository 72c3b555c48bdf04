"""`megamoe-jit verify`: run scenarios on the GPU and compare with the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._io import ExitCode, document, emit_json, json_option, progress_line, say, table
from megamoe_jit._cli._ranks import rank_count, run_ranks_option

if TYPE_CHECKING:
    from megamoe_jit._verify import Outcome

__all__ = ["verify"]


def _line(outcome: Outcome) -> str:
    verdict = "passed" if outcome.passed else "FAILED"
    text = f"{verdict}  {outcome.name}  {outcome.variant}"
    return text if outcome.passed else f"{text}: {outcome.reason}"


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"


@click.command()
@click.option(
    "--filter",
    "pattern",
    default="*",
    show_default=True,
    metavar="PATTERN",
    help="Names, globs or families of scenarios, separated by commas (L4, route.hot*, shape).",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(["auto", "pingpong", "cooperative"]),
    help="Variant to run; may be given more than once.  [default: pingpong and cooperative]",
)
@click.option("--slow", is_flag=True, help="Run the large scenarios as well.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and inputs.")
@click.option("--list", "only_list", is_flag=True, help="Print the scenarios that would run; needs no GPU.")
@run_ranks_option
@json_option
def verify(
    pattern: str,
    variants: tuple[str, ...],
    slow: bool,
    seed: int,
    only_list: bool,
    ranks: int | None,
    as_json: bool,
) -> None:
    """Run scenarios on the GPU and compare with the FP32 reference.

    With several ranks, scenarios whose experts they cannot share evenly are left out.

    Exit code 0 if all agree, 1 if one does not, 3 without a Hopper GPU.
    """
    variants = variants or ("pingpong", "cooperative")
    from megamoe_jit._scenarios import select

    several = rank_count(ranks)
    chosen = select(pattern, slow=slow)
    if several > 1:
        from megamoe_jit import _verify_ranks

        chosen = _verify_ranks.chosen(pattern, several, slow=slow)
    if only_list:
        names = [scenario.name for scenario in chosen]
        if as_json:
            emit_json(document("scenarios", scenarios=names))
        else:
            click.echo("\n".join(names))
        return

    from megamoe_jit._bench import require_hopper
    from megamoe_jit._verify import run_all

    device = require_hopper()
    with progress_line("verify", len(chosen) * len(variants)) as step:

        def note(outcome: Outcome) -> None:
            step(_line(outcome))

        found = (
            _verify_ranks.run_ranks(several, pattern, variants, note, slow=slow, seed=seed)
            if several > 1
            else run_all(pattern, variants, device, note, slow=slow, seed=seed)
        )
    if found is None:  # another rank of torchrun reports
        return
    outcomes = found
    expected = len(chosen) * len(variants)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if as_json:
        emit_json(
            document(
                "verify",
                scenarios=len(chosen),
                run=len(outcomes),
                not_run=expected - len(outcomes),
                failed=len(failed),
                outcomes=[outcome.to_json() for outcome in outcomes],
            )
        )
    else:
        rows = [
            (
                o.name,
                o.variant,
                _figure(o.diff),
                _figure(o.worst_row_diff),
                "passed" if o.passed else "FAILED",
            )
            for o in outcomes
        ]
        click.echo(table(("SCENARIO", "VARIANT", "DIFF", "WORST ROW", "RESULT"), rows, left=(0, 1)))
    say(f"{len(outcomes) - len(failed)} passed, {len(failed)} failed, {expected - len(outcomes)} not run")
    if failed or len(outcomes) < expected:
        raise click.exceptions.Exit(ExitCode.FAILED)
