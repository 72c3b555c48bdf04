"""Reading SASS with its scheduling: what the compiler told the hardware to wait for.

An instruction of SM90 has 128 bits.  Above bit 105 lie: cycles to stall before the next one (4 bits), yield, the
scoreboard it signals (3, 7 for none) and others.  https://arxiv.org/abs/1804.06826 describes the layout for Volta, and
it still holds.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FIRST = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
ZERO_LATENCY = 6  #: cycles until the result of CS2R can be read


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: byte offset, text, and the cycles until the next is issued."""

    at: int
    text: str
    stall: int

    @property
    def guarded(self) -> bool:
        """It may not be executed."""
        return self.text.startswith("@")

    @property
    def target(self) -> int | None:
        """First register written, if it writes any."""
        found = re.match(r"[A-Z0-9.]+ (?:P\d, )?R(\d+)\b", _GUARD.sub("", self.text))
        return None if found is None or self.stores else int(found[1])

    @property
    def stores(self) -> bool:
        """It reads all its operands."""
        return _GUARD.sub("", self.text).startswith(("ST", "RED"))

    @property
    def reads(self) -> set[int]:
        """Registers named among its sources."""
        text = _GUARD.sub("", self.text)
        sources = text if self.stores else text.partition(",")[2]
        return {int(n) for n in re.findall(r"\bR(\d+)\b", sources)}


def parse(listing: str) -> list[list[Instruction]]:
    """Instructions of `nvdisasm -hex`, in runs between labels."""
    runs: list[list[Instruction]] = [[]]
    lines = listing.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        first, second = _FIRST.match(line), _SECOND.match(after)
        if first and second:
            runs[-1].append(Instruction(int(first[1], 16), first[2], int(second[1], 16) >> 41 & 15))
        elif line.startswith(".L") and runs[-1]:
            runs.append([])
    return runs


def early_reads(runs: list[list[Instruction]]) -> list[str]:
    """Where a register zeroed by CS2R is read before that is done.

    NVRTC 13.0 was seen to do this when a guarded instruction may write the register in between: it kept to that one's
    shorter latency.  Where the guard was false, the old contents were read.
    """
    found = []
    for run in runs:
        for i, zero in enumerate(run):
            if not re.match(r"CS2R(\.32)? R\d+, SRZ", _GUARD.sub("", zero.text)):
                continue
            assert zero.target is not None
            registers, cycles = {zero.target, zero.target + 1}, zero.stall
            for later in run[i + 1 :]:
                if cycles >= ZERO_LATENCY:
                    break
                if later.reads & registers:
                    found.append(f"{zero.at:#x} {zero.text}; {cycles} cycles later {later.at:#x} {later.text}")
                    break
                if not later.guarded and later.target in registers:
                    break
                cycles += later.stall
    return found


def disassemble(tool: str, cubin: Path) -> str:
    """Listing of a cubin with the instructions' bits."""
    command = [tool, "-hex", "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
