"""`megamoe-jit verify`: run scenarios on the GPU and compare with the reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from megamoe_jit._cli._io import ExitCode, emit, end, json_option, progress_line, say, show, table
from megamoe_jit._cli._kernels import compile_kernels
from megamoe_jit._cli._options import rank_count, run_ranks_option, variants_option, weight_format_option
from megamoe_jit._errors import ConfigError, ToolchainError
from megamoe_jit._spec.variants import VARIANT_NAMES, Variant
from megamoe_jit._text import counted

if TYPE_CHECKING:
    import torch

    from megamoe_jit._check.documents import Outcome, Verify
    from megamoe_jit._check.scenarios import Scenario
    from megamoe_jit._spec import KernelSpec


def _line(outcome: Outcome) -> str:
    verdict = "passed" if outcome.passed else "FAILED"
    text = f"{verdict}  {outcome.name}  {outcome.variant}"
    return text if outcome.passed else f"{text}: {outcome.reason}"


def _figure(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}e}"


def _show_families(doc: Verify, ranks: int) -> None:
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
        names = len({o.name for o in outcomes})
        rows.append((family, names, len(outcomes), len(outcomes) - failed, failed, *(_figure(v, 1) for v in worst)))
    late = f", each up to {doc.skew_us} us late for each launch" if doc.skew_us else ""
    show(f"{ranks} ranks, {counted(doc.rounds, 'round')} of each scenario and variant{late}")
    show(table(("FAMILY", "SCENARIOS", "RUN", "PASSED", "FAILED", "WORST DIFF", "WORST ROW"), rows))


def _finish(doc: Verify, ranks: int, as_json: bool) -> None:
    """Say what came of it, and end the command: with 1 if an output is wrong, or not all was run."""
    failed = [outcome for outcome in doc.outcomes if not outcome.passed]
    if as_json:
        emit(doc)
    elif ranks > 1:
        _show_families(doc, ranks)
    else:
        rows = [
            (o.name, o.variant, _figure(o.diff), _figure(o.worst_row_diff), "passed" if o.passed else "FAILED")
            for o in doc.outcomes
        ]
        show(table(("SCENARIO", "VARIANT", "DIFF", "WORST ROW", "RESULT"), rows, left=(0, 1)))
    if failed:  # together, since each went by between many that passed
        say("\n".join(["failed:", *(f"  {o.name}  {o.variant}: {o.reason}" for o in failed)]))
    say(f"{len(doc.outcomes) - len(failed)} passed, {len(failed)} failed, {doc.not_run} not run")
    end(ExitCode.FAILED if failed or doc.not_run > 0 else ExitCode.OK)


def _kernels(chosen: Sequence[Scenario], variants: Sequence[str], device: torch.device, ranks: int) -> list[KernelSpec]:
    """Every kernel that the runs will ask for, each once, in the order of the scenarios."""
    from megamoe_jit._bench.measure import kernel_of
    from megamoe_jit._spec import KernelSpec, WeightFormat

    def picked(s: Scenario) -> Sequence[Variant]:
        if ranks > 1:  # a buffer of several ranks prepares every variant
            return Variant.reading(WeightFormat.parse(s.weights))
        wanted = s.runs(variants)
        return [Variant.parse(kernel_of(s.shape, s.tokens, variant, device, weights=s.weights)) for variant in wanted]

    return list(
        dict.fromkeys(
            KernelSpec(s.shape, v, ranks, numerics=s.numerics, weights=WeightFormat.parse(s.weights))
            for s in chosen
            for v in picked(s)
        )
    )


def _compile_ahead(specs: Sequence[KernelSpec], ranks: int, as_json: bool) -> None:
    """Compile in parallel, before the first run, what the runs would compile one by one.

    Nothing is judged here: what does not compile fails its scenarios later, with the reason.
    """
    from megamoe_jit._check.collect import joined
    from megamoe_jit._jit.runtime import sealed, warmup
    from megamoe_jit._settings.settings import get_settings

    settings, here = get_settings(), joined()
    if settings.no_cache or sealed():
        return
    if ranks > 1 and here is not None and here[0] > 0:  # rank 0 shows the same work; the cache shares it out
        warmup(specs, jobs=max(1, settings.jobs // ranks))
        return
    with contextlib.suppress(ToolchainError):
        compile_kernels(specs, as_json=as_json)


@click.command()
@click.option(
    "--filter",
    "pattern",
    default="*",
    show_default=True,
    metavar="PATTERN",
    help="Names, globs or families of scenarios, separated by commas (L4, route.hot*, shape).",
)
@variants_option(f"Variant to run; may be given more than once.  [default: {' and '.join(VARIANT_NAMES)}]")
@click.option("--slow", is_flag=True, help="Run the large scenarios as well.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and inputs.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="With several ranks: times that each scenario is run on its buffer, with inputs of each time.",
)
@click.option(
    "--skew",
    "skew_us",
    type=click.IntRange(0, 1_000_000),
    default=0,
    metavar="MICROSECONDS",
    help="With several ranks: each is late for each launch by a time of chance up to this.",
)
@weight_format_option("Run all with weights of one format.  [default: the scenarios' own, mostly fp8]", default=None)
@click.option("--list", "only_list", is_flag=True, help="Print the scenarios that would run; needs no GPU.")
@run_ranks_option
@json_option
def verify(only_list: bool, ranks: int | None, as_json: bool, **how: Any) -> None:
    """Run scenarios on the GPU and compare with the FP32 reference.

    Kernels that are not cached are compiled first, in parallel. With several ranks, scenarios whose experts they
    cannot share evenly are left out.

    Exit code 0 if all agree, 1 if one does not, 3 without a Hopper GPU.
    """
    if not only_list:
        from megamoe_jit._device.driver import refuse_without_gpu

        refuse_without_gpu()
    from megamoe_jit._check.documents import Scenarios, Verify
    from megamoe_jit._check.scenarios import select
    from megamoe_jit._check.verify import Runs, run_all
    from megamoe_jit._check.verify_ranks import run_ranks

    runs, several = Runs(**{**how, "variants": how["variants"] or VARIANT_NAMES}), rank_count(ranks)
    if several == 1 and (runs.rounds > 1 or runs.skew_us > 0):
        raise click.UsageError("--rounds and --skew are about several ranks; give --ranks 2 or more with them")
    chosen = select(runs.pattern, slow=runs.slow, weights=runs.weights) if several == 1 else runs.chosen(several)
    count = sum(len(scenario.runs(runs.variants)) for scenario in chosen)
    if not count:
        names = ", ".join(runs.variants)
        raise ConfigError(f"{names} multiplies no weights of these scenarios; allowed: another --variant")
    if only_list:
        listed = tuple(scenario.name for scenario in chosen)
        if as_json:
            emit(Scenarios(listed))
        else:
            show("\n".join(listed))
        return

    from megamoe_jit._bench.measure import require_hopper
    from megamoe_jit._check.collect import refusal

    device = require_hopper()
    if several == 1 or not refusal(several):  # else run_ranks refuses, at once
        _compile_ahead(_kernels(chosen, runs.variants, device, several), several, as_json)
    with progress_line("verify", count) as step:

        def note(outcome: Outcome) -> None:
            step(_line(outcome))

        outcomes = run_ranks(several, runs, note) if several > 1 else run_all(runs, device, note)
    if outcomes is None:  # another rank of torchrun reports
        return
    doc = Verify.of(outcomes, len(chosen), count, runs.rounds, runs.skew_us)
    _finish(doc, several, as_json)
