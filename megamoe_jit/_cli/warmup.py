"""`megamoe-jit warmup`: compile what calls will need, before they need it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from megamoe_jit._cli._cache_options import cache_dir_option
from megamoe_jit._cli._io import ExitCode, emit, end, json_option, say, show
from megamoe_jit._cli._kernels import compile_kernels, kernel_specs, kernel_table
from megamoe_jit._cli._nodes import nodes_option, shapes_of_a_node
from megamoe_jit._cli._options import (
    numerics_options,
    ranks_option,
    shape_options,
    variant_option,
    weight_format_option,
)
from megamoe_jit._spec.inputs import Inputs

if TYPE_CHECKING:
    from megamoe_jit._jit.documents import Kernel, KernelStatus
    from megamoe_jit._spec import MoEShape
    from megamoe_jit._spec.compilable import Compilable
    from megamoe_jit._spec.numerics import Numerics

ALL_INPUTS = "all"


@click.command()
@shape_options
@ranks_option
@nodes_option
@variant_option("One variant alone; auto compiles all that a call can pick.")
@click.option(
    "--inputs",
    default=ALL_INPUTS,
    show_default=True,
    type=click.Choice((ALL_INPUTS, *(each.value for each in Inputs))),
    help="Calls whose inputs are staged before, or those that stage themselves, as MegaMoE does.",
)
@weight_format_option("The format of the weights of the calls.")
@numerics_options
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Kernels to compile at a time.  [default: MEGAMOE_JIT_JOBS, or CPUs]"
)
@click.option("--force", is_flag=True, help="Compile again what is cached.")
@click.option("--dry-run", is_flag=True, help="Only show which kernels there would be, and which are cached.")
@click.option("--fail-fast", is_flag=True, help="Begin no further kernel after the first failure.")
@cache_dir_option
@json_option
def warmup(
    shapes: dict[str, MoEShape],
    ranks: int,
    nodes: int,
    variant: str,
    inputs: str,
    weights: str,
    numerics: Numerics,
    jobs: int | None,
    force: bool,
    dry_run: bool,
    fail_fast: bool,
    as_json: bool,
) -> None:
    """Compile the kernels of some shapes into the cache; needs no GPU.

    A kernel serves every token count, so these are all that calls of these shapes will ever need. With --nodes they
    are those of one node, which has its part of the experts, and the passes over rows that travel; --float32-out for
    results that travel in float32.

    Exit code 0, 1 if a kernel failed or could not be kept, 2 for --force where compiling is forbidden, 3 without a
    compiler, 130 when interrupted; what was compiled until then stays.
    """
    from megamoe_jit._compile.render import kernels_dir
    from megamoe_jit._errors import ConfigError
    from megamoe_jit._jit.documents import Warmup
    from megamoe_jit._settings.settings import get_settings
    from megamoe_jit._spec.any_layer import Pass, PassSpec

    settings = get_settings()
    kernels_dir()  # one that is wrong is no failure of each kernel
    if force and settings.disable_jit:
        raise ConfigError("--force compiles, which MEGAMOE_JIT_DISABLE_JIT forbids")
    wanted = shapes_of_a_node(shapes, nodes, ranks)
    specs = kernel_specs(wanted, ranks, variant, numerics, None if inputs == ALL_INPUTS else inputs, weights)
    specs += map(PassSpec, Pass) if nodes > 1 else ()
    start = time.perf_counter()
    kernels = _planned(specs, force) if dry_run else _compiled(specs, jobs, force, fail_fast, as_json)
    seconds = time.perf_counter() - start
    doc = Warmup.of(kernels, seconds, dry_run)
    if as_json:
        emit(doc)
    else:
        show(kernel_table(kernels))
    for kernel in kernels:
        if kernel.error:
            say(f"\n{kernel.kernel}: {kernel.error}")
    summary = [f"{doc.compiled} compiled", f"{doc.cached} cached", f"{doc.failed} failed"]
    summary += [f"{doc.skipped} skipped"] if doc.skipped else []
    if dry_run:
        summary = [f"{doc.cached} cached", f"{doc.missing} missing"]
    say(", ".join(summary) + (", nothing compiled" if dry_run else f" in {seconds:.2f} s"))
    lost = sum(kernel.status == "compiled" and not kernel.stored for kernel in kernels)
    if lost:
        off = "MEGAMOE_JIT_NO_CACHE turns the cache off, so"
        where = f": {off}" if settings.no_cache else f" in {settings.cache_dir}:"
        step = "" if settings.no_cache else "; set MEGAMOE_JIT_CACHE_DIR, or --cache-dir, to a folder of your own"
        say(f"{lost} could not be kept{where} other processes will compile again{step}")
    end(ExitCode.FAILED if doc.failed or lost else ExitCode.OK)


def _compiled(
    specs: Sequence[Compilable], jobs: int | None, force: bool, fail_fast: bool, as_json: bool
) -> tuple[Kernel, ...]:
    from megamoe_jit._jit.documents import Kernel

    results = compile_kernels(specs, jobs, force, fail_fast=fail_fast, as_json=as_json)
    kernels = {result.spec: Kernel.of(result) for result in results}
    if fail_fast:
        kernels.update({spec: Kernel.known(spec, "skipped") for spec in specs if spec not in kernels})
    return tuple(kernels[spec] for spec in specs if spec in kernels)


def _planned(specs: Sequence[Compilable], force: bool) -> tuple[Kernel, ...]:
    """What a warmup would find; `missing` is what it would compile."""
    from megamoe_jit._cache.entry import read_info
    from megamoe_jit._diagnose.explain import kernel_state
    from megamoe_jit._errors import ToolchainError
    from megamoe_jit._jit.documents import Kernel

    kernels = []
    for spec in specs:
        state = kernel_state(spec)
        if state.problem:
            raise ToolchainError(state.problem)
        info = read_info(state.key, state.path) if state.key and state.path and not force else None
        status: KernelStatus = "cached" if state.cached and not force else "missing"
        known = Kernel.known(spec, status, info.meta if info else None)
        kernels.append(replace(known, key=state.key, stored=state.cached))
    return tuple(kernels)
