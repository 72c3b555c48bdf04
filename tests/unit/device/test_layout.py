"""Buffer sections: apart, aligned, and as large as the kernels' indices can get."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe_jit._device.layout import ALIGN, CAPACITY_STEP, MAX_SORT_BLOCKS, BufferLayout, buffer_layout
from megamoe_jit._device.params import Params
from megamoe_jit._spec import BLOCK, MAX_TOKENS, MAX_TOPK, MoEShape
from megamoe_jit._spec import abi as _abi

#: Parameters that are neither offsets in the symmetric buffer nor addresses in the local one.
OTHERS = {
    *("expand_every", "packed1", "packed2", "expanded1", "expanded2", "expanded"),
    *("weight1_exponents", "weight2_exponents", "unused"),
    *(
        "act1",
        "most_pairs",
        "shared_weight",
        "weight1",
        "act2",
        "weight2",
        "act1_small",
        "act2_small",
        "peers",
        "weight1_scales",
        "weight2_scales",
        "y",
        "stats",
        "fault",
        "timeline",
    ),
    *(
        "timeout_ns",
        "tokens",
        "rank",
        "pool_rows",
        "counters",
        "sort_blocks",
        "item_shift",
        "lag_tiles",
        "clamp",
        "want_sides",
        "side_of_sm",
    ),
    *(
        "raw_x",
        "raw_ids",
        "raw_weights",
        "raw_x_stride",
        "raw_ids_stride",
        "raw_weights_stride",
        "raw_formats",
        "weight_factor",
    ),
}

shapes = st.builds(
    lambda h, i, local, ranks, k, shared: (
        MoEShape(128 * h, 128 * i, local * ranks, k, min(shared, MAX_TOPK - k, 1024 - local * ranks)),
        ranks,
    ),
    st.integers(1, 64),
    st.integers(1, 32),
    st.integers(1, 128),
    st.sampled_from((1, 2, 4, 8)),
    st.integers(1, MAX_TOPK),
    st.sampled_from((0, 0, 1, 3)),
)
token_counts = st.sampled_from((1, 127, 128, 129, 255, 8192, MAX_TOKENS)) | st.integers(1, MAX_TOKENS)


def indexed_bytes(shape: MoEShape, ranks: int, layout: BufferLayout) -> dict[str, int]:
    """What the kernels reach in each section (`layout/params.cuh` says with which indices)."""
    routed, pairs = layout.capacity * shape.topk, layout.capacity * (shape.topk + shape.shared)
    experts, rows, pool = shape.experts + ranks * shape.shared, layout.rows, layout.pool_rows
    hidden, intermediate = shape.hidden, shape.intermediate
    counters = rows // _abi.COUNTER_ROWS
    return {
        "x": layout.capacity * hidden,
        "x_scales": layout.capacity * (hidden // BLOCK) * 4,
        "topk_ids": routed * 8,
        "topk_weights": routed * 4,
        "expert_offsets": ranks * -(-(experts // ranks + 1) // 4) * 16,
        "sorted_pairs": ranks * pairs * 4,
        "signals": 2 * _abi.MAX_RANKS * 4,  # a word per meeting and rank
        "combine": pairs * hidden * 2,
        "act1_pool": pool * hidden,
        "act1_scales": (hidden // BLOCK) * pool * 4,
        "act2_pool": pool * intermediate,
        "act2_scales": (intermediate // BLOCK) * pool * 4,
        "row_pairs": rows * 4,
        **({"row_places": ranks * layout.capacity * 4} if ranks > 1 else {}),
        "act1_ready": counters * 4,
        "act2_ready": counters * 4,
        "act2_done": counters * 4,
        "slice_counts": MAX_SORT_BLOCKS * experts * 4,
        "control": _abi.Control.WORDS * 4,
    }


@given(shapes, token_counts)
def test_sections_are_apart_aligned_and_large_enough(sizes, tokens):
    shape, ranks = sizes
    layout = buffer_layout(shape, tokens, ranks)
    needed = indexed_bytes(shape, ranks, layout)
    assert {s.name for s in (*layout.symmetric, *layout.local)} == set(needed)
    for sections, total in ((layout.symmetric, layout.symmetric_bytes), (layout.local, layout.local_bytes)):
        ends = [s.offset + s.bytes for s in sections]
        assert sections[0].offset == 0
        assert all(end <= following.offset for end, following in zip(ends, sections[1:], strict=False))
        assert all(s.offset % ALIGN == 0 for s in sections)
        assert ends[-1] <= total
        assert total % ALIGN == 0
        assert [s.name for s in sections if s.bytes < needed[s.name]] == []
        assert [s.name for s in sections if s.bytes <= 0] == []
    assert layout.total_bytes == layout.symmetric_bytes + layout.local_bytes
    assert ALIGN % 128 == 0  # more than TMA and 16-byte accesses ask for


@given(shapes, token_counts, st.integers(1, 200_000))
def test_rows_of_every_array_can_be_moved_by_sixteen_bytes(sizes, tokens, most):
    """What TMA, bulk copies and 16-byte accesses walk over: where it begins, and from row to row."""
    shape, ranks = sizes
    layout = buffer_layout(shape, tokens, ranks, max_pool_rows=most)
    pool, pairs = layout.pool_rows, layout.capacity * shape.slots
    assert pool % _abi.POOL_ALIGN == 0, "a ring that ends within a block of rows"
    rows = {
        "x": (layout.capacity, shape.hidden),
        "combine": (pairs, shape.hidden * 2),
        "act1_pool": (pool, shape.hidden),
        "act1_scales": (shape.hidden // BLOCK, pool * 4),
        "act2_pool": (pool, shape.intermediate),
        "act2_scales": (shape.intermediate // BLOCK, pool * 4),
    }
    for name, (count, stride) in rows.items():
        section = layout.section(name)
        assert (section.offset % 16, stride % 16) == (0, 0), name
        assert count * stride <= section.bytes < count * stride + ALIGN, name


@given(st.integers(0, MAX_TOKENS))
def test_capacity_is_rounded_up(tokens):
    capacity = buffer_layout(MoEShape(128, 128, 8, 2), tokens).capacity
    assert capacity % CAPACITY_STEP == CAPACITY_STEP % BLOCK == 0
    assert max(tokens, 1) <= capacity < max(tokens, 1) + CAPACITY_STEP


def pool_rows_used(counts: list[int]) -> int:
    """Pool rows that experts with so many rows take."""
    align = _abi.POOL_ALIGN
    return sum(-(-rows // align) * align for rows in counts)


@settings(max_examples=200)
@given(
    st.integers(1, 600),
    st.integers(1, MAX_TOPK),
    st.integers(1, 1024),
    st.sampled_from((1, 2, 8)),
    st.sampled_from(("uniform", "hot", "masked", "spread")),
    st.integers(0, 2**32),
)
def test_any_routing_fits_the_pool(tokens, topk, local, ranks, kind, seed):
    """Rows of every rank's pairs, several slots of a token may name one expert, and many may be masked."""
    local = min(local, 1024 // ranks)
    layout = buffer_layout(MoEShape(128, 128, local * ranks, topk), tokens, ranks)
    rng = random.Random(seed)
    counts = [0] * local
    for pair in range(layout.capacity * topk * ranks):
        if kind == "masked" and rng.random() < 0.5:
            continue
        expert = pair if kind == "spread" else rng.randrange(local) * (kind != "hot" or rng.random() < 0.1)
        counts[expert % local] += 1
    assert pool_rows_used(counts) <= layout.rows


@given(shapes, st.integers(1, 2000))
def test_the_worst_routing_fits_the_pool(sizes, tokens):
    """As many experts as can be with one row more than full blocks."""
    shape, ranks = sizes
    local, align = shape.experts // ranks, _abi.POOL_ALIGN
    layout = buffer_layout(shape, tokens, ranks)
    received = layout.capacity * shape.topk * ranks
    active = min(local, received)
    counts = [1] * active
    blocks, rest = divmod(received - active, align)
    counts[0] += blocks * align
    counts[-1] += rest
    assert sum(counts) == received
    shared = [layout.capacity] * shape.shared  # of this rank's tokens, whatever the routing
    assert pool_rows_used([*counts, *shared]) <= layout.rows


@given(shapes, token_counts, st.integers(1, 200_000))
def test_pools_hold_no_more_than_asked_for_and_enough_to_go_on(sizes, tokens, most):
    shape, ranks = sizes
    layout = buffer_layout(shape, tokens, ranks, max_pool_rows=most)
    whole = buffer_layout(shape, tokens, ranks, max_pool_rows=1 << 40)
    assert whole.pool_rows == whole.rows == layout.rows
    assert layout.pool_rows == whole.rows or layout.pool_rows >= 2 * _abi.UNIT_ROWS
    assert layout.pool_rows <= max(-(-most // 128) * 128, 4096)


def test_the_largest_layer_fits_in_what_is_promised():
    """v4-pro at 8192 tokens on 8 ranks: all device memory beside weights and output."""
    layout = buffer_layout(MoEShape(7168, 3072, 384, 6), 8192, 8)
    assert layout.total_bytes <= 1.6 * 2**30


def test_the_bound_of_the_pool_is_tight():
    """No more than the last block is wasted on the worst routing."""
    layout = buffer_layout(MoEShape(128, 128, 8, 1), 128)
    assert 0 <= layout.rows - pool_rows_used([121, *[1] * 7]) <= 128


def test_sections_are_named_like_the_parameters_they_fill():
    names = [name for name, _ in Params._fields_]
    layout = buffer_layout(MoEShape(256, 128, 8, 2), 64, 2)
    sections = [s.name for s in (*layout.symmetric, *layout.local)]
    assert sections == [name for name in names if name not in OTHERS]  # in the struct's order, too
    assert all(layout.section(name).name == name for name in sections)
    assert set(names) >= OTHERS
    assert all(s.what for s in (*layout.symmetric, *layout.local))


@pytest.mark.parametrize("ranks", [1, 8])
def test_large_buffers_are_counted_without_overflow(ranks):
    layout = buffer_layout(MoEShape(7168, 3072, 384, 8), MAX_TOKENS, ranks, max_pool_rows=MAX_TOKENS * MAX_TOPK * ranks)
    rows = MAX_TOKENS * 8 * ranks
    assert layout.local_bytes > rows * (7168 + 3072) > 2**31
    assert layout.section("combine").bytes == MAX_TOKENS * 8 * 7168 * 2 > 2**31
