"""What several ranks add to one, by how many of the rows are remote, and beside the code of another checkout.

    python -m benchmarks.ranks --output ranks.json
    python -m benchmarks.ranks --before ../older --shapes v4-flash --tokens 64,512 --weight-format fp8

In turns within the same rounds of the same processes, of each shape with one set of weights and for each token count:

    one       one rank: the same code on one GPU, as many experts and tokens, nothing over NVLink
    half      all ranks, each expert with the rows that it has in `one`; of these (R - 1) / R are remote
    all       the same rows, all of them remote, which no number of ranks exceeds
    uniform   all ranks, routed at random, so that one rank and one expert has more rows than another

The protocol is that of `bench --ranks` but for fewer calls.  Outputs are compared with the reference first; those
of the other checkout must have the same bits.  Needs two Hopper GPUs or more.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import megamoe_jit as mm
from benchmarks.beside import PACKAGE, another_checkout, put_beside
from benchmarks.frame import asked, keep, parser, say
from megamoe_jit._bench.clock import TimedCall, anchors
from megamoe_jit._bench.conditions import environment
from megamoe_jit._bench.measure import DEFAULT_TOKENS, kernel_of, some_rows
from megamoe_jit._bench.on_ranks import RankTimer, RankWeights, measured_on_ranks, shape_on_ranks, sizes_of
from megamoe_jit._bench.rows import touched_experts
from megamoe_jit._check.collect import refusal
from megamoe_jit._check.scenarios import Inputs, Scenario, make_inputs
from megamoe_jit._check.spawn import World
from megamoe_jit._check.verify import buffer_sizes, judge
from megamoe_jit._layer.group import gather
from megamoe_jit._spec import FP8, MXFP4, MoEShape
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.reference import expert_counts

SHAPES = ("v4-flash", "v4-pro", "mimo-v2.5", "mimo-v2.5-pro")
PACKED_TOKENS = (16, 64, 256, 512)  #: of packed weights, which are for few
MODES = ("one", "half", "all", "uniform")
BEFORE = f"{PACKAGE}_before"
CLAMP = 10.0
WARMUP, TIMED = 2, 11  #: rounds
MANY_TOKENS, TIMED_MANY = 1024, 7  #: with more tokens than that fewer are timed
WARM_S = 120.0  #: for all kernels of one package and shape


def dealt(routes: Sequence[torch.Tensor], local: int, rank: int, first: int) -> torch.Tensor:
    """Ids int64 ``[T, K]`` of a rank's tokens, dealt so that each expert has as many rows as in its rank's own route.

    Args:
        routes: of each rank int64 ``[T, K]``, ids among its own experts.
        local: experts of a rank.
        rank: whose tokens.
        first: 0: slots go to all ranks in turn, its own among them; 1: to the others alone.
    """
    ranks, slots = len(routes), routes[0].shape[1]
    to = [(rank + first + slot % (ranks - first)) % ranks for slot in range(slots)]
    return torch.stack([routes[r][:, slot] + r * local for slot, r in enumerate(to)], dim=1)


class Slice(RankWeights):
    """One rank's experts of a shape: weights, and for each package a buffer of all ranks and one of this rank alone."""

    def __init__(
        self, world: World, name: str, shape: MoEShape, most: int, weights: str, packages: Sequence[str]
    ) -> None:
        import torch.distributed as dist

        super().__init__(world, shape, weights)
        self.name = name
        self.buffers, self.pairs = {}, {PACKAGE: (self.l1, self.l2)}
        for package in packages:
            its = import_module(package)
            if its is not mm:  # whose order may be another one
                self.pairs[package] = its.transform_weights_for_mega_moe_sm90(self.own.l1, self.own.l2)
            for mode, group, each in (("all", dist.group.WORLD, shape), ("one", None, self.own_shape)):
                sizes = buffer_sizes(each, most)
                self.buffers[package, mode] = its.get_symm_buffer_for_mega_moe(group, *sizes, device=world.device)

    def call(self, package: str, mode: str, inputs: Inputs, y: torch.Tensor) -> TimedCall:
        """A call of a package in one of `MODES`, with the inputs of that mode."""
        function = import_module(package).fp8_mega_moe
        buffer, pair = self.buffers[package, "one" if mode == "one" else "all"], self.pairs[package]

        def run() -> object:
            return function(y, *pair, buffer, activation_clamp=CLAMP)

        return TimedCall(run, lambda: inputs.stage(buffer))

    def check(self) -> None:
        """Raise if a kernel of any of the buffers gave up."""
        for buffer in self.buffers.values():
            buffer.check()

    def destroy(self) -> None:
        """Give the memory back, on all ranks."""
        for buffer in self.buffers.values():
            buffer.destroy()


def modes_of(layer: Slice, tokens: int) -> dict[str, tuple[Inputs, torch.Tensor, torch.Tensor]]:
    """By mode the inputs, numbers of some of their rows, and what the reference makes of these."""
    world, shape = layer.world, layer.shape
    case = Scenario(layer.name, shape, tokens, tokens, clamp=CLAMP, weights=layer.format.name)
    own_case = replace(case, shape=layer.own_shape)
    uniform = make_inputs(case, world.device, world.rank, layer.weights)
    drawn = [make_inputs(own_case, world.device, rank, layer.own) for rank in range(world.ranks)]
    own = drawn[world.rank]
    routes = [inputs.topk_idx for inputs in drawn]
    half, everything = (
        replace(uniform, topk_idx=dealt(routes, layer.own_shape.experts, world.rank, first)) for first in (0, 1)
    )
    found = {"one": (own, *some_rows(own_case, own, layer.own))}
    for mode, inputs in zip(MODES[1:], (half, everything, uniform), strict=True):
        found[mode] = (inputs, *some_rows(case, inputs, layer.weights))
    return found


def _measure(layer: Slice, tokens: int, packages: Sequence[str], timer: RankTimer) -> dict[str, Any]:
    """One case on this rank: medians by package and mode, whether outputs are right, rows of each expert."""
    y = torch.empty(tokens, layer.shape.hidden, dtype=torch.bfloat16, device=layer.world.device)
    modes = modes_of(layer, tokens)
    calls: dict[str, TimedCall] = {}
    correct, same_bits, worst = True, True, 0.0
    for mode, (inputs, where, expected) in modes.items():
        outputs = []
        for package in packages:
            call = calls[f"{package} {mode}"] = layer.call(package, mode, inputs, y)
            y.fill_(float("nan"))
            call.stage()
            call.run()
            layer.check()
            outputs.append(y.clone())
        verdict = judge(outputs[0][where], expected)
        correct, worst = correct and verdict.passed, max(worst, verdict.diff)
        same_bits = same_bits and all(torch.equal(outputs[0], other) for other in outputs[1:])
        del outputs
    times = timer.burst(calls, warmup=WARMUP, timed=TIMED if tokens <= MANY_TOKENS else TIMED_MANY)
    layer.check()
    return {
        "medians": {name: statistics.median(found) for name, found in times.items()},
        "correct": correct,
        "same_bits": same_bits,
        "diff": worst,
        "expert_rows": expert_counts(modes["uniform"][0].topk_idx, layer.shape.experts).tolist(),
    }


def _row(layer: Slice, tokens: int, packages: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of what each rank measured the largest figures."""
    own, ranks = layer.own_shape, layer.world.ranks

    def times(package: str) -> dict[str, float]:
        return {f"{mode}_us": max(part["medians"][f"{package} {mode}"] for part in parts) for mode in MODES}

    own_times, before = times(packages[0]), None
    if packages[1:]:
        before = {**times(packages[1]), "same_bits": all(part["same_bits"] for part in parts)}
    read = touched_experts(own.experts, parts) * layer.format.expert_code_bytes(own.hidden, own.intermediate)
    kernel = kernel_of(layer.shape, tokens, "auto", layer.world.device, ranks, layer.format.name)
    return {
        "shape": layer.name,
        "hidden": own.hidden,
        "intermediate": own.intermediate,
        "experts": own.experts,
        "topk": own.topk,
        "tokens": tokens,
        "ranks": ranks,
        "weights": layer.format.name,
        "kernel": kernel,
        **own_times,
        "weights_tb_s": read * 1e-6 / own_times["uniform_us"],
        "correct": all(part["correct"] for part in parts),
        "diff": max(part["diff"] for part in parts),
        "before": before,
    }


def measure_on_rank(world: World, work: list[Any], packages: list[str]) -> dict[str, Any]:
    """What each rank does; rank 0 reports each row when all ranks have it.

    Args:
        world: where it is.
        work: name, hidden, intermediate, experts of one rank, top-k, tokens, and format of the weights.
        packages: which are timed; of packed weights the first alone.
    """
    import torch.distributed as dist

    conditions, card, timer = environment(), [anchors()], RankTimer(world.device)
    for name, *sizes, tokens, weights in work:
        timed = packages if weights == FP8.name else packages[:1]
        torch.cuda.empty_cache()
        layer = Slice(world, name, shape_on_ranks(world, *sizes), max(tokens), weights, timed)
        for count in tokens:
            parts = gather(dist.group.WORLD, _measure(layer, count, timed, timer))
            if world.rank == 0:
                world.report(_row(layer, count, timed, parts))
        layer.destroy()
        del layer
    return {"environment": conditions, "anchors": [*card, anchors()]}


def warm(presets: Sequence[Preset], ranks: int, packages: Sequence[str], formats: Sequence[str]) -> None:
    """Compile what the ranks will need: every package and shape in a process of its own, all at the same time."""
    jobs = []
    for each in presets:
        sizes = {"hidden": each.shape.hidden, "intermediate": each.shape.intermediate, "topk": each.shape.topk}
        for package in packages:
            for count in (1, ranks):
                for weights in formats if package == PACKAGE else formats[:1]:
                    given = {**sizes, "experts": each.local_experts * count, "ranks": count, "inputs": "staged"}
                    given |= {"weight-format": weights} if weights != FP8.name else {}
                    words = [part for key, value in given.items() for part in (f"--{key}", str(value))]
                    jobs.append([sys.executable, "-m", package, "warmup", *words, "--jobs", "4"])
    options: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    options["env"] = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    running = [subprocess.Popen(job, **options) for job in jobs]
    failed = [error for process in running if (error := _end_of(process))]
    if failed:
        raise RuntimeError("\n".join(failed))


def _end_of(process: subprocess.Popen[str]) -> str:
    """What a process says that failed."""
    try:
        _, said = process.communicate(timeout=WARM_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"{process.args!r}: did not end"
    return f"{process.args!r}: {said}" if process.returncode else ""


def line_of(row: Mapping[str, Any]) -> str:
    """A row as text."""

    def cells(times: Mapping[str, Any]) -> str:
        one = times["one_us"]
        more = ((times[f"{mode}_us"], times[f"{mode}_us"] - one) for mode in MODES[1:])
        return f"{one:8.1f}" + "".join(f"{us:9.1f}{plus:+8.1f}{100 * plus / one:+6.1f}%" for us, plus in more)

    before = row["before"]
    text = f"{row['shape']:14}{row['weights']:6}{row['tokens']:6} |{cells(row)}"
    if before is not None:
        text += f" | before{cells(before)} {'same bits' if before['same_bits'] else 'OTHER BITS'}"
    return text + ("" if row["correct"] else "  WRONG")


def main() -> int:
    """Measure and print; 1 if an output is wrong, 3 without as many GPUs."""
    arguments = parser(__doc__)
    arguments.add_argument("--weight-format", default=f"{FP8.name},{MXFP4.name}", help="packed ones: few tokens alone")
    arguments.add_argument("--before", type=another_checkout, help="a checkout whose code takes turns")
    wanted = asked(arguments, SHAPES, DEFAULT_TOKENS, ranks=2)
    before, formats = wanted.options.before, wanted.options.weight_format.split(",")
    reason = refusal(wanted.ranks)
    if reason:  # before kernels are compiled for minutes
        arguments.exit(3, f"Error: {reason}\n")
    with tempfile.TemporaryDirectory(prefix="megamoe-jit-before-") as folder:
        packages = [PACKAGE]
        if before is not None:
            put_beside(before, BEFORE, Path(folder))
            packages.append(BEFORE)
        warm(wanted.presets, wanted.ranks, packages, formats)
        work = []
        for each in wanted.presets:
            for weights in formats:
                counts = [t for t in wanted.tokens if weights == FP8.name or t in PACKED_TOKENS]
                work.append([*sizes_of(each), counts, weights])
        target, given = "benchmarks.ranks:measure_on_rank", {"work": work, "packages": packages}
        found = measured_on_ranks(target, wanted.ranks, given, lambda row: say(line_of(row)))
    if found is None:
        raise RuntimeError("it starts its ranks itself: not under torchrun")
    keep("ranks", wanted.output, found.pop("environment"), **found)
    return int(not all(row["correct"] and (row["before"] or {"same_bits": True})["same_bits"] for row in found["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
