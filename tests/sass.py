"""Reading SASS with its scheduling: what the compiler told the hardware to wait for.

An instruction of SM90 has 128 bits.  Above bit 105 lie: cycles to stall before the next one (4 bits), yield, the
scoreboard it signals (3, 7 for none) and others.  https://arxiv.org/abs/1804.06826 describes the layout for Volta, and
it still holds.
"""

from __future__ import annotations

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megamoe_jit._compile.cubin import sections_of

_FIRST = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
ZERO_LATENCY = 6  #: cycles until the result of CS2R can be read
_CS2R, _SRZ = 0x805, 0xFF  #: the lowest 12 bits of its encoding; in bits 72 to 79, that it zeroes


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
            runs[-1].append(Instruction(int(first[1], 16), first[2], _stall(int(second[1], 16))))
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


def may_read_early(code: bytes) -> tuple[int, list[int]]:
    """What `early_reads` may find, from machine code alone, which takes a fiftieth of the time.

    An instruction names up to three registers that it reads, in bits 24 to 31, 32 to 39 and 64 to 71.  Where these are
    something else, a constant's part or an address, they may look like the register: then `early_reads` tells.

    Args:
        code: of one kernel, 16 bytes an instruction.

    Returns:
        How many CS2R zero a register, and the byte offsets of those whose register may be read too early.
    """
    zeroes, found = 0, []
    words = struct.unpack(f"<{len(code) // 8}Q", code)
    for at in range(0, len(words), 2):
        low, high = words[at], words[at + 1]
        if low & 0xFFF != _CS2R or high >> 8 & 0xFF != _SRZ:
            continue
        zeroes += 1
        registers, cycles = {low >> 16 & 0xFF, (low >> 16 & 0xFF) + 1}, _stall(high)
        for later in range(at + 2, len(words), 2):
            if cycles >= ZERO_LATENCY:
                break
            low, high = words[later], words[later + 1]
            if registers & {low >> 24 & 0xFF, low >> 32 & 0xFF, high & 0xFF}:
                found.append(at * 8)
                break
            cycles += _stall(high)
    return zeroes, found


def code_of(cubin: bytes) -> bytes:
    """The machine code of the one function in a cubin."""
    (code,) = (cubin[s.offset : s.offset + s.size] for s in sections_of(cubin) if s.name.startswith(".text."))
    return code


def _stall(high: int) -> int:
    return high >> 41 & 15


def disassemble(tool: str, cubin: Path) -> str:
    """Listing of a cubin with the instructions' bits."""
    command = [tool, "-hex", "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
