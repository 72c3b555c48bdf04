"""benchmarks/floor.py: its reading kernel compiles, and reads what it says."""

from benchmarks import floor
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.toolchain import find_toolchain
from megamoe_jit.heuristics import preset


def test_the_reading_kernel_compiles_and_fits_four_times_on_an_sm():
    result = compile_source(floor.SOURCE, kernel_name="read_weights", toolchain=find_toolchain())
    assert result.registers * floor.THREADS * floor.BLOCKS_PER_SM <= 65536
    assert f"__launch_bounds__({floor.THREADS})" in floor.SOURCE
    assert floor.PIECE_BYTES == 2048 * 16
    assert floor.SOURCE.count("* 2048") == 2


def test_pieces_cover_the_experts_of_its_shapes():
    for name in floor.SHAPES:
        shape = preset(name).shape
        assert 2 * shape.intermediate * shape.hidden % floor.PIECE_BYTES == 0
        assert shape.hidden * shape.intermediate % floor.PIECE_BYTES == 0
