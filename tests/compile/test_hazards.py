"""No register is read before the instruction that zeroes it is done: see `tests/sass.py`."""

import pytest

from megamoe_jit._diagnose.inspect import find_tool
from megamoe_jit._jit.runtime import get_kernel
from megamoe_jit._spec import FP8, MXFP4, KernelSpec, MoEShape, Variant
from tests.compile import test_presets
from tests.sass import disassemble, early_reads, parse

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


#: The shape that was hit, in every variant.
HIT = {
    f"hit-{v.value}-{weights.name}": KernelSpec(MoEShape(2304, 768, 512, 12), v, 2, weights=weights)
    for weights in (FP8, MXFP4)
    for v in Variant.reading(weights)
}
SPECS = {**test_presets.SPECS, **HIT}


def test_the_hazard_that_was_seen_is_found():
    (problem,) = early_reads(parse(SEEN))
    assert problem.startswith("0xe950 CS2R R60, SRZ; 5 cycles later 0xe980 ISETP.NE.U32.AND P1")


@pytest.mark.parametrize("name", [*test_presets.OFTEN, *HIT])
def test_no_kernel_reads_a_register_too_early(name, tmp_path):
    tool = find_tool("nvdisasm")
    assert tool is not None, "the development environment brings nvdisasm"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(get_kernel(SPECS[name]).cubin)
    runs = parse(disassemble(tool, cubin))
    assert sum(len(run) for run in runs) > 1000
    assert early_reads(runs) == []
