"""`megamoe-jit doctor`: will it work here, and if not, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._io import ExitCode, colours_wanted, emit, end, json_option, say, show
from megamoe_jit._diagnose.engines import ENGINES

if TYPE_CHECKING:
    from megamoe_jit._diagnose.finding import Check

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def _echo(check: Check) -> None:
    status = f"{check.status.value:4}"
    if colours_wanted():
        status = click.style(status, fg=_COLOURS[check.status.value])
    head, *more = check.detail.splitlines() or [""]
    show(f"  {check.name:13}  {head}", before=status)
    for line in more:
        show(f"{'':21}{line}")
    if check.next_step:
        show(f"{'':21}-> {check.next_step}")


@click.command()
@click.option("--no-trial", is_flag=True, help="Leave out the trial compile.")
@click.option("--engine", type=click.Choice(ENGINES), help="Also whether the plug-in takes in this engine, and how.")
@json_option
def doctor(no_trial: bool, engine: str | None, as_json: bool) -> None:
    """Check compiler, torch, driver, GPU, cache, locks and tools, with a trial compile; says what to do.

    Exit code 0 if all is well, 1 if something was warned of, 3 if something fails.
    """
    from megamoe_jit._diagnose.doctor import examine
    from megamoe_jit._diagnose.finding import Diagnosis, Status, worst

    checks = []
    for check in examine(not no_trial, engine):
        checks.append(check)
        if not as_json:
            _echo(check)
    verdict = worst(checks)
    if as_json:
        emit(Diagnosis.of(checks))
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    say(", ".join(f"{count} {status.value}" for status, count in counts.items()))
    end({Status.OK: ExitCode.OK, Status.WARN: ExitCode.FAILED, Status.FAIL: ExitCode.ENVIRONMENT}[verdict])
