"""Compiling kernels and showing what came of it: shared by `warmup`, `demo` and `verify`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megamoe_jit._cli._io import cell, live_terminal, say, table
from megamoe_jit._cli._options import per_shape
from megamoe_jit._errors import ToolchainError
from megamoe_jit._spec.formats import FP8

if TYPE_CHECKING:
    from megamoe_jit._jit.documents import Kernel
    from megamoe_jit._jit.runtime import WarmupResult
    from megamoe_jit._spec import MoEShape
    from megamoe_jit._spec.compilable import Compilable
    from megamoe_jit._spec.numerics import Numerics


def kernel_specs(
    shapes: Mapping[str, MoEShape],
    ranks: int = 1,
    variant: str = "auto",
    numerics: Numerics | None = None,
    inputs: str | None = None,
    weights: str = FP8.name,
) -> list[Compilable]:
    """Every kernel that calls of these shapes can pick, each once.

    Args:
        shapes: Layers by name; `experts` counts all ranks' experts.
        ranks: Ranks that share the experts.
        variant: `auto` for all that the heuristics can choose, or the name of one.
        numerics: The numeric options of the calls.
        inputs: Where the calls have their inputs from, see `enumerate_specs`.
        weights: The format of their weights.
    """
    from megamoe_jit._jit.runtime import enumerate_specs
    from megamoe_jit._spec import Variant

    variants = None if variant == "auto" else (Variant.parse(variant),)
    specs: list[Compilable] = []
    options: dict[str, Any] = {"numerics": numerics, "inputs": inputs, "weights": weights}
    specs += per_shape(shapes, lambda _, shape: enumerate_specs(shape, ranks, variants, **options))
    return list(dict.fromkeys(specs))


class _Stop(Exception):
    """The first failure has come."""


@contextlib.contextmanager
def _progress(specs: Sequence[Compilable], jobs: int, keep: bool) -> Iterator[Callable[[WarmupResult], None]]:
    """Yields a function to call with each result: redraws a live line per kernel, or prints a plain one."""
    from megamoe_jit._jit.documents import status_of

    if not live_terminal():
        yield lambda result: say(f"{status_of(result):8}  {result.spec.kernel_name}  {result.seconds:.2f} s")
        return
    from rich.console import Console
    from rich.live import Live

    from megamoe_jit._cli._live import LiveKernels

    console = Console(stderr=True, highlight=False, markup=False)
    lines = LiveKernels(specs, jobs, console)
    with Live(lines, console=console, refresh_per_second=10, transient=not keep):
        yield lambda result: lines.finish(result.spec.kernel_name, status_of(result), result.seconds)


def compile_kernels(
    specs: Sequence[Compilable],
    jobs: int | None = None,
    force: bool = False,
    *,
    fail_fast: bool = False,
    as_json: bool = False,
) -> list[WarmupResult]:
    """Compile in parallel, with one line per kernel on standard error.

    Args:
        specs: The kernels.
        jobs: Kernels to compile at a time; the settings' number if None.
        force: Compile again what is cached.
        fail_fast: Begin no further kernel after the first failure.
        as_json: Whether the caller prints a document, and not a table that repeats the lines.

    Returns:
        One result per kernel; with `fail_fast` those after the first failure may lack.

    Raises:
        ToolchainError: There is no compiler to compile any of them with.
    """
    from megamoe_jit._jit.documents import stored
    from megamoe_jit._jit.runtime import warmup
    from megamoe_jit._settings.settings import get_settings

    results: dict[Compilable, WarmupResult] = {}
    workers = min(jobs or get_settings().jobs, len(specs))
    try:
        with _progress(specs, workers, keep=as_json or not sys.stdout.isatty()) as step:

            def note(result: WarmupResult) -> None:
                results[result.spec] = result
                step(result)
                if fail_fast and result.error:
                    raise _Stop  # noqa: TRY301 - `warmup` calls this

            warmup(specs, jobs=jobs, force=force, progress=note)
    except _Stop:
        pass
    except KeyboardInterrupt:  # after the display, which would wipe it out
        kept = sum(stored(result) for result in results.values())
        say(f"{kept} of {len(specs)} kernels are ready and kept; of the others, none was finished")
        raise
    found = [results[spec] for spec in specs if spec in results]
    first = found[0].error if found else None
    if isinstance(first, ToolchainError) and all(str(result.error) == str(first) for result in found):
        raise first
    return found


def kernel_table(kernels: Sequence[Kernel]) -> str:
    """One line per kernel."""

    rows = [
        (
            kernel.kernel,
            kernel.status,
            cell(kernel.registers),
            cell(kernel.spill_bytes),
            kernel.shared_bytes,
            cell(kernel.seconds, ".2f"),
        )
        for kernel in kernels
    ]
    return table(("KERNEL", "STATUS", "REGISTERS", "SPILL B", "SHARED B", "SECONDS"), rows, left=(0, 1))
