"""What ranks check about failures: whatever goes wrong on one rank before a launch raises on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._check.spawn import World
from tests.multi.worker import Rank, forget, layer, shape_for

BASE = {
    "num_experts": 16,
    "num_max_tokens_per_rank": 512,
    "num_topk": 4,
    "hidden": 1024,
    "intermediate_hidden": 768,
}
SIZES = (1024, 768, 16, 4)
#: What the last rank asks for instead.
OTHERS = {
    "num_max_tokens_per_rank": 256,
    "hidden": 1152,
    "intermediate_hidden": 512,
    "num_topk": 2,
}
#: What only the last rank asks for, and no rank could have.
IMPOSSIBLE = {
    "hidden": 1000,
    "num_topk": 33,
    "num_max_tokens_per_rank": 0,
    "intermediate_hidden": 0,
}


def _make(world: World, **changed) -> mm.SymmBuffer:
    wanted = {**BASE, "num_experts": shape_for(world.ranks, *SIZES).experts}
    if world.rank == world.ranks - 1:
        wanted.update(changed)
    return mm.get_symm_buffer_for_mega_moe(dist.group.WORLD, **wanted, device=world.device)


def _raises(kind: type[Exception], words: list[str], action: Callable[[], object]) -> str:
    """What is wrong with how an action failed, or nothing."""
    try:
        action()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        return f"{missing} not in {type(error).__name__}: {error}" if missing else ""
    except Exception as error:
        return f"{type(error).__name__} instead of {kind.__name__}: {error}"
    return f"no {kind.__name__}"


def check_mismatch(field: str, world: World) -> str:
    """The last rank asks for another layer: every rank names the field, and what each rank asked for."""
    words = [field, f"rank 0: {BASE[field]}", f"rank {world.ranks - 1}: {OTHERS[field]}"]
    return _raises(mm.RankMismatchError, words, lambda: _make(world, **{field: OTHERS[field]}))


def check_experts_mismatch(world: World) -> str:
    """The same with the number of experts, of which each rank must have as many."""
    experts = shape_for(world.ranks, *SIZES).experts
    words = ["num_experts", f"rank 0: {experts}", f"rank {world.ranks - 1}: {2 * experts}"]
    return _raises(mm.RankMismatchError, words, lambda: _make(world, num_experts=2 * experts))


def check_impossible(field: str, world: World) -> str:
    """The last rank asks for what is not supported: it says so, and the others name it."""
    last = world.ranks - 1
    kind: type[Exception] = mm.ConfigError if world.rank == last else mm.MegaMoeError
    words = [field.removeprefix("num_").removesuffix("_hidden") if world.rank == last else f"rank {last}"]
    return _raises(kind, words, lambda: _make(world, **{field: IMPOSSIBLE[field]}))


def check_no_memory(world: World) -> str:
    """No rank has the memory: all say how many bytes."""
    huge = {**BASE, "num_experts": shape_for(world.ranks, *SIZES).experts, "num_topk": 32, "hidden": 262144}
    huge["num_max_tokens_per_rank"] = 32768
    action = lambda: mm.get_symm_buffer_for_mega_moe(dist.group.WORLD, **huge, device=world.device)  # noqa: E731
    return _raises(mm.ConfigError, ["bytes"], action)


def check_works(world: World) -> str:
    """A layer on which all agree."""
    it = layer(world, shape_for(world.ranks, *SIZES), 512)
    problem = it.check(it.some(100 + world.rank), "mixed")
    forget()
    return problem


def check_other_defaults(world: World) -> str:
    """The same in a program that has set other defaults, as engines do before they build a model."""
    with torch.device(world.device), torch.autocast("cuda", dtype=torch.bfloat16), torch.inference_mode():
        return check_works(world)


def check_capture(world: World) -> str:
    """Every rank makes a buffer in a capture: each refuses alone, and its capture goes on."""
    marker, graph = torch.zeros(1, dtype=torch.float32, device=world.device), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        marker.add_(1)
        problem = _raises(mm.CaptureError, ["make it before the capture"], lambda: _make(world))
        marker.add_(1)
    graph.replay()
    return problem or ("" if marker.item() == 2 else f"the graph counted to {marker.item()} instead of 2")


def check_one_visible_gpu(world: World) -> str:
    """Each process sees its own GPU alone, which to all of them is GPU 0."""
    seen = torch.cuda.device_count(), world.device.index
    return check_works(world) if seen == (1, 0) else f"{seen[0]} GPUs are visible, and {world.device} is used"


def check_other_sources(world: World) -> str:
    """The last rank has other kernel sources."""
    return _raises(mm.RankMismatchError, ["kernel sources", "rank 0"], lambda: _make(world))


def check_no_sources(world: World) -> str:
    """One of the last rank's kernel sources is missing."""
    last = world.ranks - 1
    words = [] if world.rank == last else [f"rank {last}"]
    return _raises(mm.MegaMoeError, words, lambda: _make(world))


def check_no_compiler(world: World) -> str:
    """The last rank has no kernel and may not compile one: all raise when preparing, and the buffer can go."""
    last = world.ranks - 1
    it = Rank(world.rank, world.ranks, world.device, shape_for(world.ranks, *SIZES), 512)
    it.stage(it.some(10))
    mine = world.rank == last
    kind, words = (mm.KernelMissingError, []) if mine else (mm.MegaMoeError, [f"rank {last}", "KernelMissingError"])
    problem = _raises(kind, words, lambda: it.call(10))
    it.buffer.destroy()
    return problem


def check_compile_error(world: World) -> str:
    """No rank's kernels compile: each raises what its compiler said, with the room and its line."""
    it = Rank(world.rank, world.ranks, world.device, shape_for(world.ranks, *SIZES), 512)
    problem = _raises(mm.CompileError, ["combine.cuh"], lambda: it.call(10))
    it.buffer.destroy()
    return problem


def check_other_kernels(world: World) -> str:
    """The last rank compiles with other options: the kernels differ."""
    it = Rank(world.rank, world.ranks, world.device, shape_for(world.ranks, *SIZES), 512)
    problem = _raises(mm.RankMismatchError, ["kernel pingpong", "rank 0"], lambda: it.call(10))
    it.buffer.destroy()
    return problem


CHECKS: dict[str, Callable[[World], str]] = {
    **{f"mismatch: {field}": partial(check_mismatch, field) for field in OTHERS},
    "mismatch: num_experts": check_experts_mismatch,
    "no memory": check_no_memory,
    "works in between": check_works,
    **{f"impossible: {field}": partial(check_impossible, field) for field in IMPOSSIBLE},
    "other defaults": check_other_defaults,
    "a buffer in a capture": check_capture,
    "works afterwards": check_works,
    "one visible GPU": check_one_visible_gpu,
    "other sources": check_other_sources,
    "no sources": check_no_sources,
    "no compiler": check_no_compiler,
    "compile error": check_compile_error,
    "other kernels": check_other_kernels,
}
#: Each in processes of its own, some with variables of their own.
ALONE = ("other sources", "no sources", "no compiler", "compile error", "other kernels")
APART = "one visible GPU"
TOGETHER = tuple(name for name in CHECKS if name not in (*ALONE, APART))
