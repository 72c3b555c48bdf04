"""What kernels and Python agree on.  Written by `make abi` from `kernels_src/`; not by hand."""

from __future__ import annotations

from enum import IntEnum

# base/constants.cuh
QUANT_BLOCK = 128
BLOCK_K = 128
BLOCK_N = 256
POOL_ALIGN = 128
COUNTER_ROWS = 64
UNIT_ROWS = 1024
MAX_RANKS = 8
SIDE_WORDS = 5
DISPATCH_CHUNK = 2048
TILE_SLOTS = 4
SHARED_LIMIT = 232448
STAGING_BYTES = 2048
WARP = 32
GROUP = 128
MATH_WARPS = 8
THREADS = 384
PAIR_BITS = 20

# comm/timeline.cuh
RECORDS = 512
RECORD_WORDS = 4

# roles/load.cuh
ACT_BOX_ROWS = 64
SMALL_BOX_ROWS = 16

# kernels/stage.cuh
STAGE_THREADS = 256

# kernels/nodes.cuh
NODES_THREADS = 256

#: `Params` of layout/params.cuh: name, type, how many, and offset in bytes.
PARAMS_BYTES, PARAMS_ALIGN = 1024, 64
PARAMS = (
    ("act1", "TensorMap", 1, 0),
    ("act2", "TensorMap", 1, 128),
    ("act1_small", "TensorMap", 1, 256),
    ("act2_small", "TensorMap", 1, 384),
    ("peers", "u64", 8, 512),
    ("x", "u64", 1, 576),
    ("x_scales", "u64", 1, 584),
    ("topk_ids", "u64", 1, 592),
    ("topk_weights", "u64", 1, 600),
    ("expert_offsets", "u64", 1, 608),
    ("sorted_pairs", "u64", 1, 616),
    ("signals", "u64", 1, 624),
    ("combine", "u64", 1, 632),
    ("act1_pool", "u64", 1, 640),
    ("act1_scales", "u64", 1, 648),
    ("act2_pool", "u64", 1, 656),
    ("act2_scales", "u64", 1, 664),
    ("row_pairs", "u64", 1, 672),
    ("act1_ready", "u64", 1, 680),
    ("act2_ready", "u64", 1, 688),
    ("act2_done", "u64", 1, 696),
    ("slice_counts", "u64", 1, 704),
    ("control", "u64", 1, 712),
    ("weight1", "u64", 1, 720),
    ("weight2", "u64", 1, 728),
    ("weight1_scales", "u64", 1, 736),
    ("weight2_scales", "u64", 1, 744),
    ("y", "u64", 1, 752),
    ("stats", "u64", 1, 760),
    ("fault", "u64", 1, 768),
    ("timeline", "u64", 1, 776),
    ("timeout_ns", "u64", 1, 784),
    ("tokens", "u32", 1, 792),
    ("rank", "u32", 1, 796),
    ("pool_rows", "u32", 1, 800),
    ("counters", "u32", 1, 804),
    ("sort_blocks", "u32", 1, 808),
    ("item_shift", "u32", 1, 812),
    ("lag_tiles", "u32", 1, 816),
    ("clamp", "float", 1, 820),
    ("want_sides", "u32", 1, 824),
    ("side_of_sm", "u32", 5, 828),
    ("raw_x", "u64", 1, 848),
    ("raw_ids", "u64", 1, 856),
    ("raw_weights", "u64", 1, 864),
    ("raw_x_stride", "u64", 1, 872),
    ("raw_ids_stride", "u32", 1, 880),
    ("raw_weights_stride", "u32", 1, 884),
    ("raw_formats", "u32", 1, 888),
    ("weight_factor", "float", 1, 892),
    ("shared_weight", "float", 1, 896),
    ("most_pairs", "u32", 1, 900),
    ("expand_every", "u32", 1, 904),
    ("unused", "u32", 13, 908),
    ("row_places", "u64", 1, 960),
    ("packed1", "u64", 1, 968),
    ("packed2", "u64", 1, 976),
    ("expanded1", "u64", 1, 984),
    ("expanded2", "u64", 1, 992),
    ("expanded", "u64", 1, 1000),
    ("weight1_exponents", "u64", 1, 1008),
    ("weight2_exponents", "u64", 1, 1016),
)

#: `StageParams` of kernels/stage.cuh: name, type, how many, and offset in bytes.
STAGE_PARAMS_BYTES, STAGE_PARAMS_ALIGN = 128, 64
STAGE_PARAMS = (
    ("x", "u64", 1, 0),
    ("ids", "u64", 1, 8),
    ("weights", "u64", 1, 16),
    ("x_scales", "u64", 1, 24),
    ("out_x", "u64", 1, 32),
    ("out_scales", "u64", 1, 40),
    ("out_ids", "u64", 1, 48),
    ("out_weights", "u64", 1, 56),
    ("x_stride", "u64", 1, 64),
    ("scales_row", "u64", 1, 72),
    ("scales_column", "u64", 1, 80),
    ("ids_stride", "u32", 1, 88),
    ("weights_stride", "u32", 1, 92),
    ("formats", "u32", 1, 96),
    ("tokens", "u32", 1, 100),
    ("masked", "u32", 1, 104),
    ("hidden", "u32", 1, 108),
    ("topk", "u32", 1, 112),
    ("weight_factor", "float", 1, 116),
    ("unused", "u32", 2, 120),
)

#: `NodesParams` of kernels/nodes.cuh: name, type, how many, and offset in bytes.
NODES_PARAMS_BYTES, NODES_PARAMS_ALIGN = 128, 64
NODES_PARAMS = (
    ("parts", "u64", 4, 0),
    ("packed", "u64", 1, 32),
    ("places", "u64", 1, 40),
    ("counts", "u64", 1, 48),
    ("back", "u64", 1, 56),
    ("y", "u64", 1, 64),
    ("part_words", "u32", 4, 72),
    ("nodes", "u32", 1, 88),
    ("tokens", "u32", 1, 92),
    ("topk", "u32", 1, 96),
    ("experts", "u32", 1, 100),
    ("rows", "u32", 1, 104),
    ("first_expert", "u32", 1, 108),
    ("hidden", "u32", 1, 112),
    ("unused", "u32", 3, 116),
)

#: `Tile` of sched/experts.cuh: name, type, how many, and offset in bytes.
TILE_BYTES, TILE_ALIGN = 32, 4
TILE = (
    ("kind", "u32", 1, 0),
    ("expert", "u32", 1, 4),
    ("n", "u32", 1, 8),
    ("row", "u32", 1, 12),
    ("rows", "u32", 1, 16),
    ("k_blocks", "u32", 1, 20),
    ("k_begin", "u32", 1, 24),
    ("pool_row", "u32", 1, 28),
)


class Wait(IntEnum):
    """What a kernel that gave up had waited for.  `comm/fault.cuh`"""

    HEAD_BARRIER = 1
    TILE_SLOT_FREE = 2
    TILE_PUBLISHED = 3
    STAGE_FREE = 4
    ROW_LOADED = 5
    ROWS_DISPATCHED = 6
    GEMM1_DONE = 7
    GEMM1_TILE_STORED = 8
    PEER_SIGNAL = 9
    TAIL_BARRIER = 10
    WEIGHT_STAGE_FREE = 11
    GEMM2_TILE_STORED = 12
    POOL_READ = 13
    GEMM2_DONE = 14
    WEIGHTS_EXPANDED = 15


class Meeting(IntEnum):
    """Where all ranks meet in a launch.  `comm/barriers.cuh`"""

    INPUTS = 0
    RESULTS = 1


class Role(IntEnum):
    """Who writes a record of the timeline.  `comm/timeline.cuh`"""

    HEAD = 0
    ACTIVATIONS = 1
    DISPATCH = 2
    PUBLISHER = 3


class Span(IntEnum):
    """What a record of the timeline is about.  `comm/timeline.cuh`"""

    NONE = 0
    COUNT = 1
    COUNT_BARRIER = 2
    ORDER = 3
    ORDER_BARRIER = 4
    EXPERT_TABLE = 5
    FIRST_ROUND = 6
    WAIT_ROWS = 7
    STREAM_ACTIVATIONS = 8
    GATHER = 9
    GEMM1 = 10
    GEMM2 = 11
    TAIL_BARRIER = 12
    COMBINE = 13
    EXPAND = 14


class Control(IntEnum):
    """Words of the control section, and how many there are.  `layout/params.cuh`"""

    GRID_BARRIER = 0
    EPOCH = 2
    SIDES = 3
    TICKET = 32
    TICKET_STRIDE = 16
    WORDS = 64
