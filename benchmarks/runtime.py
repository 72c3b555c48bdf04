"""What the runtime costs where there is no GPU: compiling, loading, meeting, listing.

    python -m benchmarks.runtime                  # prints the table
    python -m benchmarks.runtime --write          # and puts it into docs/runtime-speed.md
    python -m benchmarks.runtime --only ls,help   # some rows

Every figure is the median of several runs on an otherwise idle machine; each run of a process starts a new one with a
cache of its own.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._compile.toolchain import find_toolchain
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.runtime import enumerate_specs, forget
from megamoe_jit._settings.settings import override
from megamoe_jit._spec.any_layer import StageFormat, StageSpec
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._spec.formats import FP8, MXFP4
from megamoe_jit.heuristics.presets import preset, preset_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "runtime-speed.md"
BEGIN, END = "<!-- table begin: written by benchmarks/runtime.py -->", "<!-- table end -->"
PROCESSES = 8
ENTRIES = 1000
BYTE_CODE = tempfile.mkdtemp(prefix="megamoe-jit-benchmark-")


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds."""

    what: str
    target: str
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        value = f"{self.seconds:.2f} s"
        for unit, scale in (("ms", 1e3), ("us", 1e6)):
            if self.seconds * scale / 1e3 < 0.2:
                value = f"{self.seconds * scale:.1f} {unit}"
        return f"| {self.what} | {self.target} | {value} | {self.note} |"


def _environment(folder: str, **more: str) -> dict[str, str]:
    left_out = {"PYTHONDONTWRITEBYTECODE"}  # an installed package has its byte code
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEGAMOE_JIT_") and k not in left_out}
    if "MEGAMOE_JIT_NVRTC" in os.environ:
        kept["MEGAMOE_JIT_NVRTC"] = os.environ["MEGAMOE_JIT_NVRTC"]
    kept["PYTHONPYCACHEPREFIX"] = BYTE_CODE
    own = {"CACHE_DIR": f"{folder}/cache", "LOCK_DIR": f"{folder}/locks", "CONFIG": os.devnull}
    return {**kept, "PYTHONPATH": str(ROOT), **{f"MEGAMOE_JIT_{k}": v for k, v in own.items()}, **more}


def _command(folder: str, *arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds of the command line."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "megamoe_jit", *arguments],
        env=_environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} failed with status {status}")
    process.returncode = 0
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


def _median(measure: Callable[[], float], runs: int) -> float:
    return statistics.median(measure() for _ in range(runs))


def _anew(spec: Compilable) -> float:
    forget()
    return get_kernel(spec).seconds


def compile_rows(runs: int) -> Iterator[Row]:
    """Every preset kernel, those of packed weights, those that stage: cold, in a process that has compiled one."""
    shapes = [preset(name).shape for name in preset_names()]

    def of(weights: str) -> list[Compilable]:
        return [spec for shape in shapes for spec in enumerate_specs(shape, inputs="staged", weights=weights)]

    with tempfile.TemporaryDirectory() as folder, override(no_cache=True, lock_dir=Path(folder)):
        get_kernel(of(FP8.name)[0])
        for what, target, specs in (
            ("preset kernel", "0.6 s", of(FP8.name)),
            ("preset kernel of MXFP4 weights", "1 s", of(MXFP4.name)),
            ("staging kernel", "0.3 s", [StageSpec(form) for form in StageFormat]),
        ):
            times = {spec.kernel_name: _median(functools.partial(_anew, spec), runs) for spec in specs}
            name, slowest = max(times.items(), key=lambda item: item[1])
            note = f"{name}; median of {len(times)}: {statistics.median(times.values()):.2f} s"
            yield Row(f"cold compile, slowest {what}", target, slowest, note)


def load_rows(runs: int) -> Iterator[Row]:
    """From the disk, verified."""
    spec = enumerate_specs(preset("v4-flash").shape)[0]
    with tempfile.TemporaryDirectory() as folder, override(cache_dir=Path(folder), lock_dir=Path(folder)):
        kernel = get_kernel(spec)

        def load() -> float:
            begin = time.perf_counter()
            if user_cache().load(kernel.key) is None:
                raise RuntimeError("the entry is gone")
            return time.perf_counter() - begin

        size = f"{len(kernel.cubin) // 1024} KiB"
        yield Row("load from the disk cache, verified", "5 ms", _median(load, 20 * runs), size)
        yield Row(
            "render, key and load",
            "",
            _median(functools.partial(_anew, spec), 10 * runs),
            "all a second process does for a kernel",
        )
        begin = time.perf_counter()
        for _ in range(100_000):
            get_kernel(spec)
        yield Row("kernel that is in memory", "", (time.perf_counter() - begin) / 100_000, "per lookup")


def warmup_rows(runs: int) -> Iterator[Row]:
    """The command, from nothing."""

    def once() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return _command(folder, "warmup", "--shapes", "v4-flash")[0]

    yield Row("`warmup --shapes v4-flash` from nothing", "5 s", _median(once, runs), "start of the process included")


CHILD = """
import sys, time
import cuda.bindings.nvrtc, jinja2
from pathlib import Path
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.runtime import enumerate_specs
from megamoe_jit._compile.toolchain import find_toolchain
from megamoe_jit.heuristics.presets import preset
spec = enumerate_specs(preset("v4-flash").shape)[0]
find_toolchain()
print("ready", flush=True)
gate = Path(sys.argv[1])
while not gate.exists():
    time.sleep(0.001)
kernel = get_kernel(spec)
print(kernel.origin, time.monotonic(), flush=True)
"""


def _meet(count: int) -> tuple[float, int]:
    """Seconds until the last of `count` processes has the kernel, and how many compiled it."""
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder) / "gate"
        children = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, str(gate)], env=_environment(folder), stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        for child in children:
            if child.stdout is None or child.stdout.readline() != "ready\n":
                raise RuntimeError("a process did not get ready")
        begin = time.monotonic()
        gate.touch()
        lines = [child.communicate(timeout=120)[0].split() for child in children]
        return max(float(end) for _, end in lines) - begin, sum(origin == "compiled" for origin, _ in lines)


def stampede_rows(runs: int) -> Iterator[Row]:
    """One cold key, one and eight processes, in turn."""
    pairs = [(_meet(1), _meet(PROCESSES)) for _ in range(runs)]
    one = statistics.median(single[0] for single, _ in pairs)
    many = statistics.median(several[0] for _, several in pairs)
    compiled = max(several[1] for _, several in pairs)
    yield Row("one process, one cold key, past its imports", "", one)
    note = f"{many / one:.2f} times one; compiled {'once' if compiled == 1 else f'{compiled} times'}"
    yield Row(f"{PROCESSES} processes, one cold key, past their imports", "1.3 times one", many, note)


def _varied(meta: Metadata, number: int) -> dict[str, Any]:
    """Metadata as another kernel of this version and compiler has them: what differs between kernels does so."""
    shape = {**meta["spec"]["shape"], "experts": 8 * (1 + number % 250)}
    return {
        **meta,
        "entry": f"{meta['entry']}_{number}",
        "spec": {**meta["spec"], "shape": shape},
        "registers": 100 + number % 100,
        "dynamic_shared_bytes": 200_000 + number,
        "compile_ms": {stage: time + number for stage, time in meta["compile_ms"].items()},
        "source_id": hashlib.sha256(b"source %d" % number).hexdigest(),
        "created_at": f"2026-11-30T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}Z",
    }


def command_rows(runs: int, rows: set[str]) -> Iterator[Row]:
    """The command line's listings, by CPU time."""
    with tempfile.TemporaryDirectory() as folder, override(cache_dir=Path(folder) / "one", lock_dir=Path(folder)):
        if "ls" in rows:
            kernel = get_kernel(enumerate_specs(preset("v4-flash").shape)[0])
            source = (user_cache().entry_path(kernel.key) / "kernel.cu").read_text()
            full = KernelCache(Path(folder) / "cache")
            for number in range(ENTRIES):
                digest = hashlib.sha256(str(number).encode()).hexdigest()
                full.store(digest, kernel.cubin[:4096] + bytes(number % 8), source, _varied(kernel.meta, number))
        cases = {
            "ls": (f"`cache ls` of {ENTRIES:,} entries", "150 ms", ("cache", "ls")),
            "help": ("`--help`", "100 ms", ("--help",)),
        }
        for name, (what, target, arguments) in cases.items():
            if name in rows:
                times = [_command(folder, *arguments) for _ in range(3 * runs)]
                wall = statistics.median(wall for wall, _ in times)
                yield Row(
                    what,
                    target,
                    statistics.median(cpu for _, cpu in times),
                    f"CPU time; {wall * 1e3:.0f} ms by the clock",
                )


def table(rows: list[Row]) -> str:
    """The rows in Markdown, with a line about the machine."""
    toolchain = find_toolchain()
    cores = len(os.sched_getaffinity(0))
    gpu = "no GPU" if not Path("/dev/nvidiactl").exists() else "with a GPU"
    python, nvrtc = (".".join(map(str, version[:2])) for version in (sys.version_info, toolchain.version))
    machine = f"{cores} cores, {gpu}, Python {python}, NVRTC {nvrtc}"
    lines = [f"Measured on: {machine}.", "", "| what | target | measured | |", "|---|---|---|---|", *map(str, rows)]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and with `--write` put the table into the document."""
    names = ("compile", "load", "warmup", "stampede", "ls", "help")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help="rows to measure, separated by commas")
    parser.add_argument("--runs", type=int, default=5, help="runs per figure")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    if wanted - set(names):
        parser.error(f"rows are {', '.join(names)}")
    rows: list[Row] = []
    for name, measure in {
        "compile": compile_rows,
        "load": load_rows,
        "warmup": warmup_rows,
        "stampede": stampede_rows,
    }.items():
        if name in wanted:
            rows.extend(measure(options.runs))
    rows.extend(command_rows(options.runs, wanted))
    text = table(rows)
    sys.stdout.write((json.dumps([vars(row) for row in rows], indent=1) if options.json else text) + "\n")
    if options.write:
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(BYTE_CODE)
