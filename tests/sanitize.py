"""compute-sanitizer, kernel by kernel, on a layer that fills each place of shared memory many times.

    python -m tests.sanitize                                  both tools, every variant; needs a Hopper GPU
    python -m tests.sanitize unpack/mxfp4 --tool memcheck     some of them
    python -m tests.sanitize --tool racecheck --as-is         racecheck of the kernels that layers use

memcheck looks for accesses out of bounds, racecheck for accesses of shared memory that nothing orders.  Kernels are
compiled for this alone from the sources in force (MEGAMOE_JIT_KERNELS_SRC): as layers use them, but for racecheck with
every lane of a warp arriving where one does for all (pipe/arrivals.cuh, docs/protocol.md).  It has no way to see the
order that is kept otherwise, and names reads of the other 31 lanes with `--as-is`.  synccheck is none of the tools: it
ends every kernel at a barrier that two roles reach by instructions of their own, which PTX allows.

Prints a line for each tool and kernel, and under it the places that the tool names.  Ends with 1 if one is named, if an
output is wrong, or if a kernel could not be judged.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megamoe_jit._compile.render import kernels_dir
from megamoe_jit._diagnose.machine import find_tool
from megamoe_jit._jit.runtime import warmup
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FP8, MXFP4, KernelSpec, MoEShape, Variant, WeightFormat

REPO = Path(__file__).resolve().parents[1]
ROOM, ONE_LANE, EVERY_LANE = "pipe/arrivals.cuh", "kArrivingLanes = 1;", "kArrivingLanes = kWarp;"
RACECHECK = "racecheck"
TOOLS = (RACECHECK, "memcheck")
OPTIONS = (
    *("--kernel-name", "kernel_substring=megamoe_"),
    *("--print-limit", "1000"),
    *("--show-backtrace", "device"),  # which functions of the kernel led to the place, not which of Python
    # cuda-bindings asks for functions that the driver may lack: 34 errors to memcheck.  Who makes a call that matters
    # looks at what it returns.
    *("--report-api-errors", "no"),
)
KERNELS = tuple(f"{v.value}/{weights.name}" for weights in (FP8, MXFP4) for v in Variant.reading(weights))
#: of the experts: as few columns as there are loops for; the last has more than one tile, but not in `wide`
ROWS = (5, 12, 28, 60, 78)
SHAPE = MoEShape(1280, 512, len(ROWS), 1)
BLOCKS = 8  #: of the launch; each has several tiles, of more k-blocks than there are stages
SECONDS = 120  #: most that one kernel may take
PREFIX = re.compile(r"^=========[ ]?")
SUMMARY = re.compile(r"(?:RACECHECK|ERROR) SUMMARY: (\d+) ((?:hazard|error)s?)")
FINDING = re.compile(r"^========= \S.*(?:\n=========  +\S.*)+", re.MULTILINE)  #: a line, and those indented below it
#: what makes two findings of one place differ: threads, allocations, arguments, addresses, counts
UNSAID = re.compile(
    r"by thread .*|and is .*|(?:Error|Warning): Race reported between "
    r"|\(.*?\)( const)?|megamoe::|(?:\b(?:at|to) )?\+?\b0x[0-9a-f]+\b|\[\d+ hazards\]"
)


def every_lane(folder: Path) -> Path:
    """Kernel sources like those in force, in which every lane arrives: a new directory below `folder`."""
    sources = folder / "kernels"
    shutil.copytree(kernels_dir(), sources)
    text = (sources / ROOM).read_text(encoding="utf-8")
    assert text.count(ONE_LANE) == 1, f"{ROOM} no longer says {ONE_LANE!r} once"
    (sources / ROOM).write_text(text.replace(ONE_LANE, EVERY_LANE), encoding="utf-8")
    return sources


def spec_of(kernel: str) -> KernelSpec:
    """The kernel that is named VARIANT/FORMAT."""
    variant, _, weights = kernel.partition("/")
    return KernelSpec(SHAPE, Variant.parse(variant), weights=WeightFormat.parse(weights))


def call(kernel: str) -> bool:
    """One launch of it on this GPU; whether its output is right."""
    import torch

    import megamoe_jit as mm
    from megamoe_jit._check.scenarios import Scenario, make_inputs
    from megamoe_jit._check.verify import WeightCache, buffer_sizes, expected_of, judge, stage_with_guards

    spec, device, tokens = spec_of(kernel), torch.device("cuda", 0), sum(ROWS)
    scenario = Scenario("sanitize", SHAPE, tokens, tokens, weights=spec.weights.name)
    entry = WeightCache().get(scenario, device, 0, mm)
    inputs = make_inputs(scenario, device, weights=entry.weights)
    experts = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(ROWS))
    inputs.topk_idx.copy_(experts[:, None])
    buffer = mm.get_symm_buffer_for_mega_moe(None, *buffer_sizes(SHAPE, tokens))
    stage_with_guards(buffer, inputs, SHAPE.experts)
    y = torch.empty(tokens, SHAPE.hidden, dtype=torch.bfloat16, device=device)
    options: dict[str, Any] = {"variant": spec.variant.value, "num_sms": BLOCKS, **scenario.options}
    mm.fp8_mega_moe(y, entry.l1, entry.l2, buffer, **options)
    buffer.check()
    buffer.destroy()
    verdict = judge(y, expected_of(scenario, inputs))
    print(verdict.reason or "output right")  # noqa: T201
    return verdict.passed


def prepared(specs: list[KernelSpec], folder: Path, *, every: bool) -> dict[str, str]:
    """Compile kernels into `folder`; the environment in which `call` finds them there."""
    sources, cache = every_lane(folder) if every else kernels_dir(), folder / "cache"
    with override(kernels_src=sources, cache_dir=cache):
        failed = [result.error for result in warmup(specs) if result.error]
    if failed:
        raise failed[0]
    settings = {"KERNELS_SRC": sources, "CACHE_DIR": cache, "L2_SIDES": 0, "TIMEOUT_S": 20}
    own = {f"MEGAMOE_JIT_{name}": str(value) for name, value in settings.items()}
    # Each tensor is an allocation then, of which memcheck knows the end, not a piece of a larger one.
    return {**os.environ, **own, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def judged(sanitizer: str, tool: str, kernel: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and report of `call` under a tool; -1 if it took too long."""
    command = [sanitizer, "--tool", tool, *OPTIONS, sys.executable, "-m", "tests.sanitize", "--call", kernel]
    with subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            report, _ = process.communicate(timeout=SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return -1, process.communicate()[0]
    return process.returncode, report


def places(report: str) -> list[str]:
    """What a tool names, each once: an access, what it is said to clash with, and where they are."""
    found = (
        [" ".join(UNSAID.sub("", PREFIX.sub("", line)).split()) for line in finding.split("\n")]
        for finding in FINDING.findall(report)
    )
    return list(dict.fromkeys(" ".join(filter(None, dict.fromkeys(lines))) for lines in found))


def say(what: str, code: int, report: str, seconds: float) -> bool:
    """Print what came of one kernel under one tool; whether all was well."""
    summary = SUMMARY.search(report)
    count = " ".join(summary.groups()) if summary else "not judged"
    output = "output right" if code == 0 else f"ended with {code}"
    print(f"{what:28} {count:>12}  {output}  {seconds:.0f} s", flush=True)  # noqa: T201
    lines = report.splitlines()
    if summary:  # what is not said above: the output
        lines = [line for line in lines if code != 0 and not PREFIX.match(line)]
    for line in [*places(report), *lines[-15:]]:
        print(f"    {line}")  # noqa: T201
    return summary is not None and int(summary[1]) == 0 and code == 0


def main(arguments: list[str]) -> int:
    """Judge kernels with one tool after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="VARIANT/FORMAT", help=f"default: {' '.join(KERNELS)}")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be repeated; default: all of them")
    parser.add_argument("--as-is", action="store_true", help="racecheck too of the kernels that layers use")
    parser.add_argument("--logs", type=Path, help="a directory for the whole reports")
    parser.add_argument("--call", metavar="VARIANT/FORMAT", help="launch it here, once, and judge its output alone")
    chosen = parser.parse_args(arguments)
    if chosen.call:
        return 0 if call(chosen.call) else 1
    sanitizer = find_tool("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        parser.error("compute-sanitizer is not found: install the CUDA toolkit, or put it on the PATH")
    kernels, well = chosen.kernels or KERNELS, True
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        for tool in dict.fromkeys(chosen.tool or TOOLS):
            every = tool == RACECHECK and not chosen.as_is
            environment = prepared([spec_of(kernel) for kernel in kernels], Path(folder), every=every)
            for kernel in kernels:
                begin = time.monotonic()
                code, report = judged(sanitizer, tool, kernel, environment)
                well &= say(f"{tool} {kernel}", code, report, time.monotonic() - begin)
                if chosen.logs:
                    chosen.logs.mkdir(parents=True, exist_ok=True)
                    (chosen.logs / f"{tool}-{kernel.replace('/', '-')}.txt").write_text(report, encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
