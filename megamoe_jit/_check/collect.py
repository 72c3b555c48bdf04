"""What a function says on several ranks: those of a running torchrun, or else processes started for it (`spawn`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from megamoe_jit._check.spawn import World, describe, join_group, run_ranks, target_function
from megamoe_jit._errors import ConfigError, MegaMoeError


def joined() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, if torchrun (or the like) started it."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None


def refusal(ranks: int, device: str = "cuda") -> str:
    """Why so many ranks cannot be had here, by torchrun or as processes of this host; empty if they can."""
    import torch

    here = joined()
    if here is not None:
        size = here[1]
        return "" if size == ranks else f"ranks = {ranks}, but torchrun started {size}; allowed: the same number"
    if device != "cuda" or (gpus := torch.cuda.device_count()) >= ranks:
        return ""
    return f"ranks = {ranks} needs {ranks} GPUs; allowed: up to {gpus} here"


def collect(
    target: str,
    ranks: int,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: str = "cuda",
    timeout_s: float = 3600.0,
    group_timeout_s: float = 300.0,
    on_report: Callable[[int, Any], None] = lambda _, __: None,
) -> list[Any] | None:
    """Results of a function on all ranks: as one of torchrun's ranks, otherwise in processes of their own.

    Args:
        target: as in `run_ranks`.
        ranks: how many; torchrun must have started as many.
        arguments: as in `run_ranks`.
        device: as in `run_ranks`.
        timeout_s: after this, ranks started here are killed.
        group_timeout_s: of collectives on the process group.
        on_report: called with rank and report as they come; under torchrun on each rank with its own.

    Returns:
        Results by rank; None under torchrun on every rank but 0, which has nothing to say.

    Raises:
        ConfigError: torchrun started another number of ranks, or there are fewer GPUs.
        MegaMoeError: a rank failed; says what all of them said.
    """
    reason, here = refusal(ranks, device), joined()
    if reason:
        raise ConfigError(reason)
    if here is None:
        ends = run_ranks(
            target,
            ranks,
            arguments,
            device=device,
            timeout_s=timeout_s,
            group_timeout_s=group_timeout_s,
            on_report=on_report,
        )
        if not all(end.ok for end in ends):
            raise MegaMoeError(f"not every rank finished:\n{describe(ends)}")
        return [end.result for end in ends]
    return _as_torchrun_rank(target, arguments, device, here, group_timeout_s, on_report)


def _as_torchrun_rank(
    target: str,
    arguments: Mapping[str, Any] | None,
    device: str,
    here: tuple[int, int],
    group_timeout_s: float,
    on_report: Callable[[int, Any], None],
) -> list[Any] | None:
    import torch.distributed as dist

    rank, ranks = here
    own = join_group(device, int(os.environ.get("LOCAL_RANK", rank)), group_timeout_s)
    world = World(rank, ranks, own, lambda value: on_report(rank, value))
    result = target_function(target)(world, **(arguments or {}))
    results: list[Any] = [None] * ranks
    dist.all_gather_object(results, result)
    dist.destroy_process_group()
    return results if rank == 0 else None
