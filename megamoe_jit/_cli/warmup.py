"""`megamoe-jit warmup`: compile what calls will need, before they need it."""

from __future__ import annotations

import time

import click

from megamoe_jit._cli._io import ExitCode, document, emit_json, json_option, say
from megamoe_jit._cli._kernels import compile_kernels, kernel_document, kernel_specs, kernel_table, status
from megamoe_jit._cli.shapes import named_shapes, shape_options

__all__ = ["warmup"]


@click.command()
@shape_options
@click.option("--ranks", default=1, show_default=True, help="GPUs that share the experts of one layer.")
@click.option(
    "--variant",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "pingpong", "cooperative"]),
    help="One variant alone; auto compiles all that a call can pick.",
)
@click.option("--fast-math/--no-fast-math", default=True, help="The fast_math of the calls.  [default: fast]")
@click.option("--jobs", type=click.IntRange(min=1), help="Kernels to compile at a time.  [default: CPUs]")
@click.option("--force", is_flag=True, help="Compile again what is cached.")
@json_option
def warmup(
    names: str | None,
    hidden: int | None,
    intermediate: int | None,
    experts: int | None,
    topk: int | None,
    ranks: int,
    variant: str,
    fast_math: bool,
    jobs: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compile the kernels of some shapes into the cache; needs no GPU.

    One kernel serves every token count, so this is all that calls of these shapes will ever need.
    """
    shapes = named_shapes(names, hidden=hidden, intermediate=intermediate, experts=experts, topk=topk)
    specs = kernel_specs(shapes.values(), ranks, variant, fast_math)
    start = time.perf_counter()
    results = compile_kernels(specs, jobs, force)
    seconds = time.perf_counter() - start
    found = [status(result) for result in results]
    counts = {name: found.count(name) for name in ("compiled", "cached", "failed")}
    if as_json:
        emit_json(document("warmup", **counts, seconds=seconds, kernels=[kernel_document(r) for r in results]))
    else:
        click.echo(kernel_table(results))
    for result in results:
        if result.error:
            say(f"\n{result.spec.entry}: {result.error}")
    say(", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {seconds:.2f} s")
    if counts["failed"]:
        raise click.exceptions.Exit(ExitCode.FAILED)
