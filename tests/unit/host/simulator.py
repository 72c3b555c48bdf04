"""Builds the kernels against the stand-ins of `shim/` and runs them on the virtual machine of `sim/`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2

from megamoe_jit._device.fault import decode
from megamoe_jit._device.layout import BufferLayout, Section, buffer_layout
from megamoe_jit._spec import FP8, KernelSpec, MoEShape, Variant, WeightFormat
from megamoe_jit._spec.abi import WARP
from megamoe_jit._spec.inputs import Inputs
from tests import host

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Change:
    """A change of a header's text; `old` must be there exactly once."""

    room: str
    old: str
    new: str


CHUNK = 256  #: bytes that dispatch moves at a time there
#: Small units and chunks, so that small batches wrap the pools and rows are moved in several pieces.
SMALL = (
    Change("base/constants.cuh", "kUnitRows = 1024", "kUnitRows = 128"),
    Change("base/constants.cuh", "kDispatchChunk = 2048", f"kDispatchChunk = {CHUNK}"),
)
#: The virtual ranks' memory is seen through pointers that check every access.
CHECKED = (
    Change("layout/params.cuh", "MEGA_DEVICE T* symmetric(", "MEGA_DEVICE sim::Pointer<T> symmetric("),
    Change("layout/params.cuh", "p.peers[rank] + offset", "p.peers[sim::existing(rank)] + offset"),
    Change("stage/quantise.cuh", "    float* scales;", "    sim::Pointer<float> scales;"),
    Change("stage/quantise.cuh", "scales[group] = by.scale", "scales[group] = sim::staged_scale(by.scale)"),
)
POINTER = re.compile(r"^( +)((?:const )?\w+)\* (\w+);", re.MULTILINE)
TRAP = re.compile(r"asm volatile\(.*?\);", re.DOTALL)


def changed_rooms(target: Path, changes: Sequence[Change]) -> Path:
    """Copies of the rooms that the simulation reads with changes, to come first on the include path."""
    names = ["comm/fault.cuh", *(c.room for c in (*CHECKED, *changes))]
    rooms = {name: (host.KERNELS / name).read_text() for name in names}
    for change in (*CHECKED, *changes):
        found = rooms[change.room].count(change.old)
        assert found == 1, f"{change.room} has {change.old!r} {found} times: adapt the simulation to its new text"
        rooms[change.room] = rooms[change.room].replace(change.old, change.new)
    rooms["layout/params.cuh"], pointers = POINTER.subn(r"\1sim::Pointer<\2> \3;", rooms["layout/params.cuh"])
    assert pointers > 12
    trap = "ptx::gave_up(who, which, expected, seen);"
    rooms["comm/fault.cuh"], traps = TRAP.subn(trap, rooms["comm/fault.cuh"])
    assert traps == 1
    for name, text in rooms.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    return target


def configs(shape: MoEShape, ranks: int, compare_sizes: bool, inputs: Inputs, weights: WeightFormat) -> str:
    """The `Config` of every variant that reads these weights, each in a namespace of its own; and all of them.

    A `Config` is as the Jinja2 template has it.
    `with_config(number, call)` calls with the one of that number, `kVariants` are their names in that order.
    """
    parts, calls = ["#pragma once\n"], []
    variants = Variant.reading(weights)
    for number, variant in enumerate(variants):
        spec = KernelSpec(shape=shape, ranks=ranks, variant=variant, inputs=inputs, weights=weights)
        entry = (host.KERNELS / spec.template).read_text()
        body = re.search(r"^struct Config \{.*?^\};", entry, re.MULTILINE | re.DOTALL)
        assert body, f"{spec.template} no longer declares `struct Config`"
        values = spec.template_variables()
        filled = jinja2.Template(body[0], undefined=jinja2.StrictUndefined).render(values)
        parts += [f'#include "{values[header]}"\n' for header in ("policy_header", "weights_header")]
        parts.append(f"namespace variant{number} {{\n{filled}\n}}\n")
        calls.append(f"    if (number == {number}) return call(variant{number}::Config{{}});\n")
        if compare_sizes:
            size = f"megamoe::Shared<variant{number}::Config>::kBytes == {spec.shared_bytes}"
            parts.append(f'static_assert({size}, "KernelSpec.shared_bytes and layout/shared.cuh disagree");\n')
    names = ", ".join(f'"{variant.value}"' for variant in variants)
    parts.append(f"const std::vector<std::string> kVariants = {{{names}}};\n")
    parts.append(f"template <class Call> auto with_config(megamoe::u32 number, Call call) {{\n{''.join(calls)}")
    parts.append('    sim::fail("no such variant");\n}\n')
    return "".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What a run said; `problem` is empty when nothing was wrong."""

    problem: str
    counts: dict[str, int] = field(default_factory=dict)  #: pairs, and what `sim/memory.h` counts between ranks


@dataclass(frozen=True)
class Simulator:
    """The kernels of one layer on some ranks, as a program."""

    program: Path
    shape: MoEShape
    ranks: int

    @classmethod
    def build(
        cls,
        folder: Path,
        shape: MoEShape,
        ranks: int,
        changes: Sequence[Change] = SMALL,
        inputs: Inputs = Inputs.STAGED,
        weights: WeightFormat = FP8,
    ) -> Simulator:
        rooms = changed_rooms(folder / "rooms", changes)
        (rooms / "configs.h").write_text(configs(shape, ranks, not changes, inputs, weights))
        paths = [option for path in (rooms, HERE / "shim") for option in ("-iquote", str(path))]
        warps = max(KernelSpec(shape, v, ranks, weights=weights).threads for v in Variant.reading(weights)) // WARP
        options = [
            f"-DBLOCK_WARPS={warps}",
            "-Og",
            "-fno-exceptions",
            "-Wno-unknown-pragmas",
            "-U_FORTIFY_SOURCE",
            *paths,
        ]
        return cls(host.build(HERE / "protocol.cpp", folder / "protocol", *options), shape, ranks)

    def layout(self, tokens: int, pool_rows: int) -> BufferLayout:
        """The package's own, but with pools as small as asked for."""
        layout = buffer_layout(self.shape, tokens, self.ranks)
        return layout if pool_rows >= layout.rows else _with_pools(layout, self.shape, pool_rows)

    def run(
        self,
        seed: int,
        tokens: int,
        blocks: int,
        pool_rows: int = 1 << 30,
        launches: int = 2,
        variant: str = "mixed",
        mutant: int = 0,
    ) -> Outcome:
        layout = self.layout(tokens, pool_rows)
        numbers = {
            "seed": seed,
            "tokens": tokens,
            "blocks": blocks,
            "launches": launches,
            "pool_rows": layout.pool_rows,
            "rows": layout.rows,
            "most_pairs": layout.most_pairs,
            "mutant": mutant,
        }
        options = [f"{name}={value}" for name, value in numbers.items()]
        sections = {"symmetric": layout.symmetric, "local": layout.local}
        options += [f"{k}={','.join(f'{s.name}:{s.offset}:{s.bytes}' for s in v)}" for k, v in sections.items()]
        command = [str(self.program), *options, f"variant={variant}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=host.PATIENCE, check=False)
        if done.returncode == 0:
            return Outcome("", {name: int(n) for name, n in (word.split("=") for word in done.stdout.split())})
        return Outcome("\n".join(map(_sentence, done.stdout.splitlines())) or f"ended with code {done.returncode}")


def _with_pools(layout: BufferLayout, shape: MoEShape, pool_rows: int) -> BufferLayout:
    """The same with pools of fewer rows than the package would ever make."""
    bytes_per_row = {"act1_pool": shape.hidden, "act1_scales": shape.hidden // 32}
    bytes_per_row |= {"act2_pool": shape.intermediate, "act2_scales": shape.intermediate // 32}
    local = [
        Section(s.name, s.offset, pool_rows * bytes_per_row.get(s.name, 0) or s.bytes, s.what) for s in layout.local
    ]
    return replace(layout, local=tuple(local), pool_rows=pool_rows)


def _sentence(line: str) -> str:
    """A fault record in the words of the package; any other line as it is."""
    if not line.startswith("fault "):
        return line
    rank, *words = map(int, line.split()[1:])
    return f"rank {rank}: {decode(words)}"
