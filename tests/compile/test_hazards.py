"""No register is read before the instruction that zeroes it is done: see `tests/sass.py`."""

import re
from pathlib import Path

import pytest

from megamoe_jit._diagnose.machine import find_tool
from megamoe_jit._spec import FP8, MXFP4, MoEShape, Variant
from tests.compile.kernels import compiled
from tests.compile.test_presets import OFTEN, SPECS
from tests.sass import Instruction, code_of, disassemble, early_reads, may_read_early, parse

#: What NVRTC 13.0.88 made of a pointer that was null or computed, and then compared with null.  The kernel then stored
#: through the null pointer (2 ranks, hidden 2304, intermediate 768, 512 experts, top-k 12, cooperative).
SEEN = """
/*e950*/ CS2R R60, SRZ ; /* 0x00000000003c7805 */
/* 0x000fe4000001ff00 */
/*e960*/ @!P1 IMAD.WIDE.U32 R60, R65, 0x1200, R42 ; /* 0x00001200413c9825 */
/* 0x000fe200078e002a */
/*e970*/ @P0 IADD3.X R27, RZ, R57, RZ, P4, !PT ; /* 0x00000039ff1b0210 */
/* 0x000fe400027fe4ff */
/*e980*/ ISETP.NE.U32.AND P1, PT, R60, RZ, PT ; /* 0x000000ff3c00720c */
/* 0x000fc60003f25070 */
"""


def test_the_hazard_that_was_seen_is_found():
    (problem,) = early_reads(parse(SEEN))
    assert problem.startswith("0xe950 CS2R R60, SRZ; 5 cycles later 0xe980 ISETP.NE.U32.AND P1")
    code = b"".join(int(word, 16).to_bytes(8, "little") for word in re.findall(r"0x([0-9a-f]{16})", SEEN))
    assert may_read_early(code) == (1, [0])
    patient = code[:8] + (int.from_bytes(code[8:16], "little") | 7 << 41).to_bytes(8, "little") + code[16:]
    assert may_read_early(patient) == (1, [])


def test_a_kernel_that_was_hit_is_among_those_that_are_compiled():
    """Its shape, over as many ranks, in every variant."""
    shape = MoEShape(2304, 768, 512, 12)
    found = {(s.variant, s.weights) for s in (SPECS[name] for name in OFTEN) if (s.shape, s.ranks) == (shape, 2)}
    assert found == {(variant, weights) for weights in (FP8, MXFP4) for variant in Variant.reading(weights)}


@pytest.mark.parametrize("name", OFTEN)
def test_no_kernel_reads_a_register_too_early(name, tmp_path):
    cubin = compiled(SPECS[name]).cubin
    code = code_of(cubin)
    zeroes, found = may_read_early(code)
    assert len(code) > 16 * 1000
    assert zeroes > 10
    if found:
        assert early_reads(listing(cubin, tmp_path)) == []


def test_machine_code_is_read_as_it_is_disassembled(tmp_path):
    cubin = compiled(SPECS[OFTEN[0]]).cubin
    code, runs = code_of(cubin), listing(cubin, tmp_path)
    instructions = [each for run in runs for each in run]
    assert [each.at for each in instructions] == list(range(0, len(code), 16))
    zeroes = [each for each in instructions if "CS2R" in each.text and each.text.endswith("SRZ")]
    assert may_read_early(code)[0] == len(zeroes)


def listing(cubin: bytes, folder: Path) -> list[list[Instruction]]:
    """What the disassembler makes of it."""
    tool = find_tool("nvdisasm")
    assert tool is not None, "the development environment brings nvdisasm"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return parse(disassemble(tool, path))
