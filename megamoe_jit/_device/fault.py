"""The record that a kernel leaves in host memory before it ends itself, in words.

Four 32-bit words: what | warp << 8 | block << 16, which one, expected, seen (`kernels_src/comm/fault.cuh`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megamoe_jit._errors import DeviceFaultError, MegaMoeError, PeerTimeoutError
from megamoe_jit._spec.abi import COUNTER_ROWS, MAX_RANKS, Meeting, Wait

#: By code: what was waited for, and who should have done it.  Rows are numbered through all experts, each of which
#: begins at a multiple of 128.
WAITS: dict[int, str] = {
    Wait.HEAD_BARRIER: "all {expected} blocks of the launch to reach grid barrier {which}",
    Wait.TILE_SLOT_FREE: "the readers to free the slot of tile {which}",
    Wait.TILE_PUBLISHED: "the scheduler to publish tile {which}",
    Wait.STAGE_FREE: "the math warps to free pipeline stage {which}",
    Wait.ROW_LOADED: "a row being copied by dispatch, of those from row {which} on",
    Wait.ROWS_DISPATCHED: "dispatch to bring the rows from {row} on ({seen} of {expected} arrived)",
    Wait.GEMM1_DONE: "the first GEMM to finish the rows from {row} on ({seen} of {expected} tiles done)",
    Wait.GEMM1_TILE_STORED: "the math warps to finish tile {which}, of the first GEMM",
    Wait.PEER_SIGNAL: "the other ranks to have their {meeting} ready in launch {expected} (missing: {ranks})",
    Wait.TAIL_BARRIER: "all {expected} blocks of the launch to finish their tiles (grid barrier {which})",
    Wait.WEIGHT_STAGE_FREE: "the math warps (with unpack, the helpers) to free pipeline stage {which} for weights",
    Wait.GEMM2_TILE_STORED: "the math warps to finish tile {which}, of the second GEMM",
    Wait.POOL_READ: "the first GEMM to read the rows from {row} on, whose place is wanted "
    "({seen} of {expected} tiles done)",
    Wait.GEMM2_DONE: "the second GEMM to finish the rows from {row} on, whose place is wanted "
    "({seen} of {expected} tiles done)",
    Wait.WEIGHTS_EXPANDED: "packed weights of column {which} to be expanded ({seen} of {expected} pieces done)",
}

LOST = "nothing"  #: what the driver said of a kernel whose end it has not noticed (`wait.py`)

MEETINGS = {meeting.value: meeting.name.lower() for meeting in Meeting}  #: of a `PEER_SIGNAL`

ROLES = ("activations warp", "weights warp", "dispatch warp", "publisher warp")


@dataclass(frozen=True, slots=True)
class Fault:
    """A decoded record."""

    what: int
    warp: int
    block: int
    which: int
    expected: int
    seen: int

    @property
    def role(self) -> str:
        """Which part of the block waited."""
        if self.what == Wait.HEAD_BARRIER or (self.what == Wait.PEER_SIGNAL and self.which == Meeting.INPUTS):
            return "head"  # before the warps have their roles
        return ROLES[self.warp] if self.warp < len(ROLES) else f"math warp {self.warp - len(ROLES)}"

    def __str__(self) -> str:
        text = WAITS.get(self.what, "something unknown (code {what})")
        ranks = ", ".join(f"rank {r}" for r in range(MAX_RANKS) if self.seen >> r & 1)  # of a `PEER_SIGNAL`'s bit mask
        waited = text.format(
            what=self.what,
            which=self.which,
            row=self.which * COUNTER_ROWS,
            meeting=MEETINGS.get(self.which, self.which),
            expected=self.expected,
            seen=self.seen,
            ranks=ranks,
        )
        return f"block {self.block}, {self.role}, waited in vain for {waited}"


def decode(words: Sequence[int]) -> Fault | None:
    """The fault in the record's four words, or None when it is empty."""
    if words[0] == 0:
        return None
    who, which, expected, seen = (int(w) & 0xFFFFFFFF for w in words[:4])
    return Fault(who & 0xFF, who >> 8 & 0xFF, who >> 16, which, expected, seen)


def fault_error(fault: Fault | None, rank: int, cause: str | None) -> MegaMoeError:
    """The exception to raise for a launch that failed; `cause` is what the driver said, None if the device is idle."""
    if fault is None:
        return DeviceFaultError(
            f"rank {rank}: the GPU reported an error and no MoE kernel left a fault record, so the cause may be "
            f"another kernel; the CUDA context is unusable, restart the process. The driver said: {cause}"
        )
    kind = PeerTimeoutError if fault.what == Wait.PEER_SIGNAL else DeviceFaultError
    text = (
        f"rank {rank}: {fault}, then the kernel ended itself; the CUDA context is unusable, restart the process. "
        "The deadline is MEGAMOE_JIT_TIMEOUT_S."
    )
    if cause == LOST:
        text += (
            " The driver has not noticed, so other calls that wait for this GPU may wait for ever; "
            "if the process does not end by itself, end it by SIGKILL."
        )
    return kind(text)
