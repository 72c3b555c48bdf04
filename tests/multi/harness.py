"""Many checks in one spawn of ranks, none of which may hang the others.

A check is a function of `World` that says what is wrong on its rank, or nothing.  After each one all ranks tell each
other how it went, through a process group of its own: a rank that raised in the middle of a check meets the others
there, once their collectives and kernels have timed out.  After an exception nothing more is run.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megamoe_jit._check.spawn import World, describe, run_ranks
from megamoe_jit._jit.runtime import warmup
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FP8
from megamoe_jit._spec.inputs import Inputs
from tests.multi.worker import forget

KERNEL_S = 8.0  #: the kernels' own deadline


def run_checks_on_rank(world: World, module: str, names: list[str], collective_s: float) -> None:
    """What a rank does: the checks `names` of the table CHECKS of `module`, in order."""
    checks: Mapping[str, Callable[[World], str | None]] = importlib.import_module(module).CHECKS
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * collective_s))
    for name in names:
        problem, fatal = "", False
        try:
            problem = checks[name](world) or ""
            if world.device.type == "cuda":
                torch.cuda.synchronize()
        except BaseException:
            problem, fatal = traceback.format_exc(), True
        everyone: list[Any] = [None] * world.ranks
        dist.all_gather_object(everyone, (problem, fatal), group=control)
        if world.rank == 0:
            world.report([name, {f"rank {rank}": text for rank, (text, _) in enumerate(everyone) if text}])
        if any(fatal for _, fatal in everyone):
            raise RuntimeError(f"check {name!r} raised on {[r for r, (_, f) in enumerate(everyone) if f]}")
    forget()


def run_checks(
    module: str,
    names: Sequence[str],
    ranks: int,
    *,
    timeout_s: float = 300.0,
    collective_s: float = 60.0,
    environment: Mapping[int, Mapping[str, str]] | None = None,
    device: str = "cuda",
) -> dict[str, str]:
    """What is wrong with each check, by name; an empty text for those that passed on every rank.

    Args:
        module: has the table CHECKS.
        names: which of them, in order.
        ranks: how many ranks.
        timeout_s: when the ranks are killed, whatever they do.
        collective_s: a collective on the host that takes longer has lost a rank, and raises.
        environment: more variables, by rank.
        device: `cuda` or `cpu`.
    """
    own = environment or {}
    variables = {
        rank: {"MEGAMOE_JIT_TIMEOUT_S": str(KERNEL_S), "TORCH_NCCL_ENABLE_MONITORING": "0", **own.get(rank, {})}
        for rank in range(ranks)
    }
    ends = run_ranks(
        "tests.multi.harness:run_checks_on_rank",
        ranks,
        {"module": module, "names": list(names), "collective_s": collective_s},
        device=device,
        timeout_s=timeout_s,
        group_timeout_s=collective_s,
        grace_s=5 * collective_s,
        environment=variables,
    )
    reported = {name: problems for name, problems in ends[0].messages}
    results = {
        name: "\n".join(f"{rank}: {text}" for rank, text in problems.items()) for name, problems in reported.items()
    }
    missing = [name for name in names if name not in results]
    if missing or not all(end.ok for end in ends):
        story = describe(ends)
        for name in missing:
            results[name] = f"not run; the ranks ended before:\n{story}"
        if not missing and not any(results.values()):
            results[names[-1]] = f"all checks passed, but not every rank ended well:\n{story}"
    return results


def warm(
    shapes: Sequence[MoEShape],
    ranks: int,
    fast_math: Sequence[bool] = (True,),
    inputs: Sequence[Inputs] = (Inputs.STAGED,),
    variants: Sequence[Variant] = Variant.reading(FP8),
) -> None:
    """Compile what the ranks will need, in parallel; raises if a kernel does not compile."""
    specs = [
        KernelSpec(shape, variant, ranks, fast, inputs=form)
        for shape in shapes
        for variant in variants
        for fast in fast_math
        for form in inputs
    ]
    for result in warmup(dict.fromkeys(specs)):
        if result.error is not None:
            raise result.error
