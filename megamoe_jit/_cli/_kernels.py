"""Compiling kernels and showing what came of it: shared by `warmup` and `demo`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megamoe_jit._cli._io import progress_line, table
from megamoe_jit._errors import ToolchainError

if TYPE_CHECKING:
    from megamoe_jit._runtime import WarmupResult
    from megamoe_jit._spec import KernelSpec, MoEShape

__all__ = ["compile_kernels", "kernel_document", "kernel_specs", "kernel_table", "status"]


def kernel_specs(
    shapes: Iterable[MoEShape], ranks: int = 1, variant: str = "auto", fast_math: bool = True
) -> list[KernelSpec]:
    """Every kernel that calls of these shapes can pick, each once.

    Args:
        shapes: Layers; `experts` counts all ranks' experts.
        ranks: Ranks that share the experts.
        variant: `auto` for all that the heuristics can choose, or the name of one.
        fast_math: The option of the same name of a call.
    """
    from megamoe_jit._spec import KernelSpec, Variant
    from megamoe_jit.heuristics.select import AUTO, all_variants

    specs = [
        KernelSpec(shape, each, ranks, fast_math)
        for shape in shapes
        for each in (all_variants(shape) if variant == AUTO else (Variant.parse(variant),))
    ]
    return list(dict.fromkeys(specs))


def status(result: WarmupResult) -> str:
    """`compiled`, `cached` or `failed`."""
    if result.kernel is None:
        return "failed"
    return "compiled" if result.kernel.origin == "compiled" else "cached"


def _line(result: WarmupResult) -> str:
    return f"{status(result):8}  {result.spec.entry}  {result.seconds:.2f} s"


def compile_kernels(specs: Sequence[KernelSpec], jobs: int | None, force: bool) -> list[WarmupResult]:
    """Compile in parallel, with one line per kernel on standard error.

    Raises:
        ToolchainError: There is no compiler to compile any of them with.
    """
    from megamoe_jit._runtime import warmup

    with progress_line("compile", len(specs)) as step:
        results = warmup(specs, jobs=jobs, force=force, progress=lambda result: step(_line(result)))
    first = results[0].error if results else None
    if isinstance(first, ToolchainError) and all(str(result.error) == str(first) for result in results):
        raise first
    return results


def kernel_document(result: WarmupResult) -> dict[str, Any]:
    """One kernel for a JSON document."""
    meta = result.kernel.meta if result.kernel else {}
    return {
        "kernel": result.spec.entry,
        "spec": result.spec.to_json(),
        "status": status(result),
        "key": result.kernel.key if result.kernel else None,
        "registers": meta.get("registers"),
        "spill_bytes": meta.get("spill_bytes"),
        "shared_bytes": result.spec.shared_bytes,
        "nvrtc": meta.get("nvrtc", {}).get("version"),
        "seconds": result.seconds,
        "error": str(result.error) if result.error else None,
    }


def kernel_table(results: Sequence[WarmupResult]) -> str:
    """One line per kernel."""

    def figure(value: int | None) -> str:
        return "-" if value is None else str(value)

    rows = [
        (
            kernel["kernel"],
            kernel["status"],
            figure(kernel["registers"]),
            figure(kernel["spill_bytes"]),
            kernel["shared_bytes"],
            f"{kernel['seconds']:.2f}",
        )
        for kernel in map(kernel_document, results)
    ]
    return table(("KERNEL", "STATUS", "REGISTERS", "SPILL B", "SHARED B", "SECONDS"), rows, left=(0, 1))
