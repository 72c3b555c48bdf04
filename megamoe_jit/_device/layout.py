"""What lies where in the buffers of one rank, in bytes: the only definition of these offsets.

The kernel gets offsets and addresses as parameters, so capacity stays a run-time value.  Nothing here depends on the
variant: ranks with different token counts may run different ones on the same buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe_jit._documents import Count
from megamoe_jit._spec import BLOCK, MoEShape
from megamoe_jit._spec.abi import COUNTER_ROWS, MAX_RANKS, POOL_ALIGN, Control, Meeting

ALIGN = 1024  #: every section starts at a multiple of this
CAPACITY_STEP = 128  #: token capacity is rounded up to a multiple of this
DEFAULT_POOL_ROWS = 65536  #: rows the pools hold at most unless the caller says otherwise
MIN_POOL_ROWS = 4096  #: a unit of the tile order has 1024 rows, at most 1536, and a few should be under way
MAX_SORT_BLOCKS = 128


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a buffer.

    Attributes:
        offset: where it begins, in bytes
        what: for people
    """

    name: str
    offset: Count
    bytes: Count
    what: str


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """All sections of one rank's buffers.

    Attributes:
        symmetric: sections that peers may read or write.
        local: sections of this rank alone.
        capacity: tokens this rank can hold.
        rows: rows this rank can receive, the worst case over all routings, each expert's padded to 128.
        pool_rows: rows the pools hold; fewer than `rows` makes them rings, which drop nothing: dispatch then waits
            for the matrix work.
        most_pairs: (token, slot) pairs of one rank.
    """

    symmetric: tuple[Section, ...]
    local: tuple[Section, ...]
    capacity: int
    rows: int
    pool_rows: int
    most_pairs: int

    @property
    def symmetric_bytes(self) -> int:
        """Size of the symmetric buffer."""
        return _end(self.symmetric)

    @property
    def local_bytes(self) -> int:
        """Size of the local buffer."""
        return _end(self.local)

    @property
    def total_bytes(self) -> int:
        """Device memory of one rank beside weights and output."""
        return self.symmetric_bytes + self.local_bytes

    def section(self, name: str) -> Section:
        """The section called `name`."""
        return next(s for s in self.symmetric + self.local if s.name == name)


def _end(sections: tuple[Section, ...]) -> int:
    last = sections[-1]
    return _up(last.offset + last.bytes, ALIGN)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _place(sizes: list[tuple[str, int, str]]) -> tuple[Section, ...]:
    sections, offset = [], 0
    for name, size, what in sizes:
        sections.append(Section(name, offset, size, what))
        offset = _up(offset + size, ALIGN)
    return tuple(sections)


def buffer_layout(
    shape: MoEShape, max_tokens: int, ranks: int = 1, max_pool_rows: int = DEFAULT_POOL_ROWS
) -> BufferLayout:
    """Lay out the buffers of one rank.

    Args:
        shape: sizes of the layer.
        max_tokens: tokens per rank; rounded up to a multiple of 128.
        ranks: ranks that share the experts.
        max_pool_rows: most rows the pools may hold; rounded up to a multiple of 128.
    """
    tokens = max(_up(max_tokens, CAPACITY_STEP), CAPACITY_STEP)
    hidden, intermediate, topk, slots = shape.hidden, shape.intermediate, shape.topk, shape.slots
    experts = shape.experts_of(ranks)
    local_experts = experts // ranks
    pairs = tokens * slots
    # every routed pair of every rank may name an expert of this one; shared experts have this rank's tokens alone
    received = tokens * (topk * ranks + shape.shared)
    rows = _up(received + min(local_experts, received) * (POOL_ALIGN - 1), POOL_ALIGN)
    pool = min(rows, _up(max(max_pool_rows, MIN_POOL_ROWS), POOL_ALIGN))
    symmetric = _place(
        [
            ("x", tokens * hidden, f"input codes e4m3 [{tokens}, {hidden}]"),
            ("x_scales", tokens * hidden // BLOCK * 4, f"input scales f32 [{tokens}, {hidden // BLOCK}]"),
            ("topk_ids", tokens * topk * 8, f"expert of each slot i64 [{tokens}, {topk}]"),
            ("topk_weights", tokens * topk * 4, f"weight of each slot f32 [{tokens}, {topk}]"),
            ("expert_offsets", ranks * _up(local_experts + 1, 4) * 4, "first pair of each expert, by source rank u32"),
            ("sorted_pairs", ranks * pairs * 4, "(token, slot) pairs by source rank and expert u32"),
            ("signals", len(Meeting) * MAX_RANKS * 4, "launch that each rank has reached, by meeting u32"),
            ("combine", pairs * hidden * 2, f"expert outputs bf16 [{tokens}, {slots}, {hidden}]"),
        ]
    )
    local = _place(
        [
            ("act1_pool", pool * hidden, f"rows by expert e4m3 [{pool}, {hidden}]"),
            ("act1_scales", pool * hidden // BLOCK * 4, f"their scales f32 [{hidden // BLOCK}, {pool}]"),
            ("act2_pool", pool * intermediate, f"after SwiGLU e4m3 [{pool}, {intermediate}]"),
            ("act2_scales", pool * intermediate // BLOCK * 4, f"f32 [{intermediate // BLOCK}, {pool}]"),
            ("row_pairs", rows * 4, "origin of each row u32"),
            ("act1_ready", rows // COUNTER_ROWS * 4, "rows arrived u32"),
            ("act2_ready", rows // COUNTER_ROWS * 4, "tiles of the first GEMM finished u32"),
            ("act2_done", rows // COUNTER_ROWS * 4, "tiles of the second GEMM finished u32"),
            ("slice_counts", MAX_SORT_BLOCKS * experts * 4, "pairs of each expert by slice u32"),
            ("control", Control.WORDS * 4, "grid barrier, epoch, blocks by side, tickets u32"),
            *([("row_places", ranks * tokens * 4, "where rows of other ranks lie u32")] if ranks > 1 else []),
        ]
    )
    return BufferLayout(symmetric, local, tokens, rows, pool, pairs)
