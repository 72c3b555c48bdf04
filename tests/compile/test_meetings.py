"""What a meeting of ranks costs, in machine code: the same for two ranks and for eight."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe_jit._diagnose.machine import find_tool
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.abi import Meeting
from tests.compile.kernels import compiled
from tests.sass import disassemble, parse

SHAPE = MoEShape(512, 256, 16, 2)


def instructions(spec: KernelSpec, folder: Path) -> list[str]:
    """Of the whole kernel, without what guards them."""
    tool = find_tool("nvdisasm")
    assert tool is not None, "the development environment brings nvdisasm"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled(spec).cubin)
    texts = [each.text for run in parse(disassemble(tool, cubin)) for each in run]
    return [text.partition(" ")[2] if text.startswith("@") else text for text in texts]


def count(texts: list[str], *beginnings: str) -> int:
    return sum(text.startswith(beginnings) for text in texts)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_fences_and_stores_of_a_meeting_do_not_grow_with_the_ranks(ranks: int, tmp_path: Path):
    """One with each block's addition to the grid barrier, one before the last one's signals, which are one instruction.

    The compiler may write the addition of block 0 apart from that of others. Whoever gives up (`comm/fault.cuh`) stores
    its record and fences once, and is not counted here.
    """
    texts = instructions(KernelSpec(SHAPE, Variant.PINGPONG, ranks), tmp_path)
    gave_up, additions = count(texts, "ATOMG.E.EXCH"), count(texts, "ATOMG.E.ADD.STRONG.SYS")
    meetings = 0 if ranks == 1 else len(Meeting)
    assert gave_up > 5
    assert additions in (meetings, 2 * meetings)
    assert count(texts, "MEMBAR.ALL.SYS", "MEMBAR.SC.SYS") - gave_up - additions == meetings
    assert count(texts, "STG.E.STRONG.SYS") - gave_up == meetings
