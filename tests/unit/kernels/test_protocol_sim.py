"""The protocol without a GPU: the kernels on virtual ranks, blocks and threads, in interleavings of chance.

`tests/unit/host/` builds the headers of `kernels_src/` with stand-ins for the PTX instructions alone and runs them; see
`docs/protocol.md`, "Tested without GPUs".  A run fails when threads wait for each other, when an access is not ordered
after what it needs, when anything lies outside of its buffer, and when one output is not what the routing asks for.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamoe_jit._spec import FP8, MXFP4, KernelSpec, MoEShape, Variant, WeightFormat
from megamoe_jit._spec.abi import Meeting, Wait
from megamoe_jit._spec.inputs import Inputs
from tests import host, sanitize
from tests.unit.host.simulator import CHUNK, HERE, SMALL, Change, Simulator, changed_rooms

#: By number of ranks.  Full and half tiles of columns, iterations of the main loop of one and of two k-blocks,
#: one and several iterations per tile, rows that dispatch moves in one piece or in several.
SHAPES = {
    1: MoEShape(640, 384, 6, 3),
    2: MoEShape(512, 256, 8, 2),
    4: MoEShape(256, 128, 8, 4),
    8: MoEShape(128, 256, 16, 2),
}
TOKENS = {1: 100, 2: 60, 4: 24, 8: 16}  #: most of a rank
BLOCKS = {1: 6, 2: 4, 4: 2, 8: 2}  #: most of a launch

#: A wait that is over at once, by its code; ranks that take the launch before for this one, or miss one of
#: the meetings; an order of tiles that does not see that its ring is full; sides of which one has no block, or had one
#: in the launch before; a block that takes tiles of another side than it has counted as.  Which one is chosen when
#: the program runs.  Places are kept of rows that others will lie over.
MISTAKES = (
    *SMALL,
    Change("comm/fault.cuh", "if (ready()) return;", "if (sim::mutant == static_cast<u32>(what) || ready()) return;"),
    Change("comm/barriers.cuh", "(words + r) - epoch", "(words + r) - epoch + (sim::mutant == 201)"),
    Change(
        "comm/barriers.cuh",
        "rank_wait<kRanks>(p,",
        "if (sim::mutant != 203 + static_cast<u32>(meeting)) rank_wait<kRanks>(p,",
    ),
    Change("dispatch/places.cuh", "row + p.pool_rows >= rows", "(sim::mutant == 225 || row + p.pool_rows >= rows)"),
    Change("sched/order.cuh", "next2.first() + ring", "next2.first() + (sim::mutant == 202 ? 1u << 20 : ring)"),
    Change("dispatch/sort.cuh", "= even_enough(", "= sim::mutant == 205 ? p.want_sides : even_enough("),
    Change("kernels/megamoe.cuh", "? shared.side() :", "? (sim::mutant == 207 ? 0 : shared.side()) :"),
    Change(
        "roles/combine.cuh",
        "blockIdx.x == 0) p.control[kControlSides]",
        "blockIdx.x == 0 && sim::mutant != 206) p.control[kControlSides]",
    ),
)
#: Of launches that stage their inputs: rows that the bulk copies of dispatch read without a fence after the barrier;
#: rows that are quantised after the barrier that the others wait at.
RAW_MISTAKES = (
    *SMALL,
    Change(
        "dispatch/pull.cuh",
        "C::kInputs == Inputs::raw) ptx",
        "C::kInputs == Inputs::raw) if (sim::mutant != 208) ptx",
    ),
    Change("kernels/megamoe.cuh", "Inputs::raw) stage_rows", "Inputs::raw) if (sim::mutant != 209) stage_rows"),
    Change(
        "kernels/megamoe.cuh",
        "    if (ptx::warp_id() == 0) build_expert_table",
        "    if constexpr (C::kInputs == Inputs::raw) if (sim::mutant == 209) stage_rows<C>(p);\n"
        "    if (ptx::warp_id() == 0) build_expert_table",
    ),
)
NO_FENCE, LATE_ROWS = 208, 209
LOST_PLACE = 225
STALE_EPOCH, BLIND_ORDER, NO_INPUTS, NO_RESULTS, LONELY_SIDE, OLD_SIDES, OTHER_SIDE = 201, 202, 203, 204, 205, 206, 207

#: Of two ranks, with two experts that every token of a rank goes to beside those of its router.
SHARED = MoEShape(256, 128, 4, 2, 2)
#: Of them: ids are not made room for; rows of shared experts are counted, where there is no counter; the router's
#: weight is taken for theirs.
SHARED_MISTAKES = (
    *SMALL,
    Change("stage/inputs.cuh", "? id + static", "? sim::mutant == 210 ? id : id + static"),
    Change("dispatch/sort.cuh", "e < kLocalRouted<C>)", "(sim::mutant == 211 || e < kLocalRouted<C>))"),
    Change("stage/inputs.cuh", "return slot >= kRouted", "return sim::mutant != 212 && slot >= kRouted"),
)
NO_ROOM, ALL_COUNTED, ITS_WEIGHT = 210, 211, 212

#: With packed weights: the bytes of exponents are not waited for; math warps that exchange results do not meet, one
#: meeting after the other; with more than 64 columns what is exchanged overlaps codes, a stage is not waited for, or an
#: expert's tiles of 80 rows count the same ones; where both blocks of a k-block are loaded at once, the next stage is
#: not waited for, or the first k-block lacks one.
PACKED_MISTAKES = (
    *SMALL,
    Change("mma/code_stream.cuh", "(full, bytes + bytes", "(full, bytes + (sim::mutant == 213 ? 0 : bytes)"),
    Change("roles/swapped_math.cuh", "        ptx::named_sync", "        if (sim::mutant != 214) ptx::named_sync"),
    Change(
        "epilogue/swapped_quant.cuh",
        "activate<0>(result);\n",
        "activate<0>(result);\n if (sim::mutant != 215)",
    ),
    Change("epilogue/swapped_quant.cuh", "make_scale();\n", "make_scale();\n if (sim::mutant != 216)"),
    Change(
        "epilogue/swapped_quant.cuh",
        "stage_codes<0>(result);\n",
        "stage_codes<0>(result);\n if (sim::mutant != 217)",
    ),
    Change(
        "epilogue/swapped_scatter.cuh", "                meet();", "                if (sim::mutant != 218) meet();"
    ),
    Change(
        "epilogue/swapped_scatter.cuh",
        "stage(result, first);\n            meet()",
        "stage(result, first);\n            if (sim::mutant != 219) meet()",
    ),
    Change("epilogue/swapped_quant.cuh", "address + kCodesBytes", "address + (sim::mutant == 226 ? 0 : kCodesBytes)"),
    Change("mma/one_by_one.cuh", "if (more) wait(ring)", "if (more && sim::mutant != 227) wait(ring)"),
    Change("sched/order.cuh", "rows <= C::kBlockM ?", "sim::mutant == 228 || rows <= C::kBlockM ?"),
    Change("mma/swapped.cuh", "if (more) wait_barrier", "if (more && sim::mutant != 235) wait_barrier"),
    Change("roles/swapped_math.cuh", "kColumnsAtOnce) load(1)", "kColumnsAtOnce && sim::mutant != 236) load(1)"),
)
LATE_EXPONENTS, MEETINGS, OF_LARGE_TILES, AT_ONCE = 213, range(214, 220), (226, 227, 228), (235, 236)

#: With packed weights that are unpacked in shared memory, or expanded in memory: packed weights, or a free stage, are
#: not waited for; a stage is full without them; activations are read before they are there, by some lanes alone, or not
#: at all; a stage's weight scales are overwritten before they are read; unpacked weights are not fenced; a piece counts
#: as expanded before it is written; blocks that dispatch take each other's rows; the matrix work does not wait.
EXPAND_MISTAKES = (
    *SMALL,
    Change(
        "expand/beside.cuh",
        "wait_barrier_watched(shared.packed_full",
        "if (sim::mutant != 220) wait_barrier_watched(shared.packed_full",
    ),
    Change(
        "expand/beside.cuh",
        "wait_barrier_watched(shared.empty",
        "if (sim::mutant != 221) wait_barrier_watched(shared.empty",
    ),
    Change(
        "expand/beside.cuh",
        "        PackedGroups rows[2];",
        "        if (sim::mutant == 222 && threadIdx.x % kGroup < kWarp) return;\n        PackedGroups rows[2];",
    ),
    Change("expand/beside.cuh", "__all_sync(~0u, ptx", "sim::mutant == 229 || each_or_all(~0u, ptx"),
    Change(
        "mma/stages.cuh",
        "namespace megamoe {\n",
        "namespace megamoe {\ninline bool each_or_all(u32 all, bool mine) {\n"
        "    return sim::mutant == 231 ? mine : __all_sync(all, mine);\n}\n",
    ),
    Change(
        "layout/shared.cuh", "parity * (kWeightScales - 1)", "(sim::mutant == 230 ? 0 : parity) * (kWeightScales - 1)"
    ),
    Change("expand/beside.cuh", "if (!ready && more)", "if (!ready && more && sim::mutant != 232)"),
    Change("expand/beside.cuh", "ptx::fence_async_shared();", "if (sim::mutant != 233) ptx::fence_async_shared();"),
    Change("expand/ahead.cuh", "ptx::fence_async_shared();", "if (sim::mutant != 234) ptx::fence_async_shared();"),
    Change(
        "expand/ahead.cuh",
        "                ptx::bulk_wait<kSlots - 1>();",
        "if (sim::mutant != 223) ptx::bulk_wait<kSlots - 1>();",
    ),
    Change(
        "kernels/megamoe.cuh",
        "gather, share.dispatcher, share.dispatchers)",
        "gather, sim::mutant == 224 ? blockIdx.x : share.dispatcher, share.dispatchers)",
    ),
    Change("comm/fault.cuh", "if (ready()) return;", "if (sim::mutant == static_cast<u32>(what) || ready()) return;"),
)
#: One program for both, and for the waits that a single rank has.
MXFP4_MISTAKES = (*PACKED_MISTAKES, *EXPAND_MISTAKES[len(SMALL) :])
BESIDE_MISTAKES = (220, 221, 222, *range(229, 234))
AHEAD_MISTAKES = (223, 224, 234, Wait.WEIGHTS_EXPANDED.value)

Build = Callable[..., Simulator]


@pytest.fixture(scope="module")
def build() -> Build:
    """Programs by number of ranks and changes, each built once."""
    with tempfile.TemporaryDirectory(prefix="protocol-") as folder:

        @cache
        def attempt(
            ranks: int, changes: tuple[Change, ...], inputs: Inputs, shape: MoEShape | None, weights: WeightFormat
        ) -> Simulator | AssertionError:
            try:
                place = Path(tempfile.mkdtemp(dir=folder))
                return Simulator.build(place, shape or SHAPES[ranks], ranks, changes, inputs, weights)
            except AssertionError as error:  # the next test need not wait to hear the same
                return error

        def built(
            ranks: int,
            changes: tuple[Change, ...] | None = None,
            inputs: Inputs = Inputs.STAGED,
            shape: MoEShape | None = None,
            weights: WeightFormat = FP8,
        ) -> Simulator:
            if changes is None:  # of two ranks there is a program anyway, which makes mistakes where it is asked to
                changes = MISTAKES if ranks == 2 else SMALL
            if isinstance(result := attempt(ranks, changes, inputs, shape, weights), AssertionError):
                raise result
            return result

        yield built


def codes(text: str, enum: str) -> dict[str, int]:
    """Names and numbers of an enumeration of the simulator."""
    body = re.search(rf"enum {enum} : u32 \{{(.*?)\}};", text, re.DOTALL)
    assert body, f"no enum {enum}"
    return {name: int(code) for name, code in re.findall(r"(\w+) = (\d+)", host.without_comments(body[1]))}


def test_iterations_of_one_and_of_two_k_blocks_are_run():
    """As `kKBlocksPerIteration` decides in mma/block_scaled.cuh; of two, with more than one iteration."""
    depths = [(shape.hidden // 128, shape.intermediate // 128) for shape in SHAPES.values()]
    even = [pair for pair in depths if pair[0] % 2 == pair[1] % 2 == 0]
    assert 0 < len(even) < len(depths)
    assert any(max(pair) > 2 for pair in even)


@st.composite
def runs(draw: st.DrawFn, ranks: int) -> dict[str, int | str]:
    """Arguments of a run; the seed decides on routing, token counts, grids, options and whom to starve."""
    return {
        "seed": draw(st.integers(1, 2**31)),
        "tokens": draw(st.integers(1, TOKENS[ranks])),
        "blocks": draw(st.integers(1, BLOCKS[ranks])),
        "pool_rows": draw(st.sampled_from((256, 384, 1024, 1 << 30))),  # rings of two and three blocks, and none
        "launches": draw(st.integers(1, 3)),
        "variant": draw(st.sampled_from(("mixed", *(v.value for v in Variant.reading(FP8))))),
    }


@pytest.mark.parametrize("ranks", SHAPES)
def test_any_interleaving_gives_the_right_result(build: Build, ranks: int):
    simulator = build(ranks)

    @settings(max_examples=56 // (ranks + 2), database=None, suppress_health_check=list(HealthCheck))
    @given(runs(ranks))
    def check(run: dict[str, int | str]) -> None:
        assert simulator.run(**run).problem == ""

    check()


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_the_launch_itself_stages_are_the_right_ones(build: Build, ranks: int):
    simulator = build(ranks, RAW_MISTAKES, Inputs.RAW)

    @settings(max_examples=12 // ranks, database=None, suppress_health_check=list(HealthCheck))
    @given(runs(ranks))
    def check(run: dict[str, int | str]) -> None:
        assert simulator.run(**run).problem == ""

    check()


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_are_staged_late_or_copied_without_a_fence_are_found(build: Build, ranks: int):
    simulator = build(ranks, RAW_MISTAKES, Inputs.RAW)
    assert re.search(
        r"race: a copy of rank \d .* without a proxy fence since the write of", find(simulator, NO_FENCE, tries=200)
    )
    assert re.search(r"race: .* x(_scales)? of rank \d .* without waiting for the", find(simulator, LATE_ROWS))


def test_every_token_also_goes_to_its_own_ranks_shared_experts(build: Build):
    """With ids, weights and counters of its router's experts alone; some ids are one past the last of them."""
    simulator = build(2, SHARED_MISTAKES, Inputs.RAW, SHARED)

    @settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck))
    @given(runs(2))
    def check(run: dict[str, int | str]) -> None:
        assert simulator.run(**run).problem == ""

    check()


@pytest.mark.parametrize("mistake", [NO_ROOM, ALL_COUNTED, ITS_WEIGHT])
def test_a_mistake_with_shared_experts_is_found(build: Build, mistake: int):
    assert find(build(2, SHARED_MISTAKES, Inputs.RAW, SHARED), mistake) != ""


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_what_goes_from_rank_to_rank_is_what_must(build: Build, ranks: int):
    """Scales once for a pair, rows at most so often, by 16 bytes or more; no table is read; one round of signals."""
    shape, launches, deepest, simulator = SHAPES[ranks], 2, 0, build(ranks)
    spared = 0
    for seed in range(1, 13):
        run = simulator.run(seed, tokens=TOKENS[ranks], blocks=1, launches=launches, variant="cooperative")
        assert run.problem == ""
        counts, peers = run.counts, launches * ranks * (ranks - 1)
        pairs = counts["remote_pairs"]
        assert counts["small_loads"] == 0
        most = pairs * (shape.hidden + 16)  # up to four scales
        chunks_spared, rest = divmod(most - counts["loaded_bytes"], min(CHUNK, shape.hidden))
        assert rest == 0
        assert chunks_spared >= 0
        spared += chunks_spared
        assert counts["stores"] == pairs * shape.hidden * 2 // 16
        assert counts["small_stores"] == pairs + peers * (shape.experts // ranks + 1)
        assert counts["signals"] == peers * len(Meeting)
        assert counts["signals_of_a_lane"] == 1
        deepest = max(deepest, counts["copies_in_flight"])
    assert spared > 0, "a row that another expert of the rank has is not pulled again"
    chunks = 2 * -(-shape.hidden // CHUNK)  # of two items of one row; of larger items two
    assert deepest == max(2, min(KernelSpec(shape, Variant.COOPERATIVE, ranks).dispatch_slots - 1, chunks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_weights_are_multiplied_where_they_belong(build: Build, ranks: int):
    simulator = build(ranks, MXFP4_MISTAKES, weights=MXFP4)

    @settings(max_examples=20 // ranks, database=None, suppress_health_check=list(HealthCheck))
    @given(runs(ranks))
    def check(run: dict[str, int | str]) -> None:
        variants = [variant.value for variant in Variant.reading(MXFP4)]
        among = run["variant"] if run["variant"] in variants else "mixed"
        assert simulator.run(**run | {"variant": among}).problem == ""

    check()


@pytest.mark.parametrize("mistake", [LATE_EXPONENTS, *MEETINGS, *AT_ONCE])
def test_a_mistake_with_packed_weights_is_found(build: Build, mistake: int):
    simulator = build(1, MXFP4_MISTAKES, weights=MXFP4)
    problems = (simulator.run(seed, 100, 3, 256, variant="decode", mutant=mistake).problem for seed in range(1, 41))
    assert any(problems)


@pytest.mark.parametrize("pool_rows", [256, 384, 1 << 30])
def test_an_expert_with_more_rows_than_the_largest_tile_has_smaller_ones(build: Build, pool_rows: int):
    simulator = build(1, MXFP4_MISTAKES, weights=MXFP4)
    for seed in (1, 3, 5):  # which gives some of the experts more
        assert simulator.run(seed, 240, 3, pool_rows, variant="wide").problem == ""


@pytest.mark.parametrize("mistake", OF_LARGE_TILES)
def test_a_mistake_with_more_than_64_columns_is_found(build: Build, mistake: int):
    """What is exchanged lies where codes of other columns are still read; the next stage is not waited for; two tiles
    of an expert count the same rows."""
    simulator = build(1, MXFP4_MISTAKES, weights=MXFP4)
    problems = (simulator.run(seed, 160, 3, variant="wide", mutant=mistake).problem for seed in range(1, 41))
    assert any(problems)


@pytest.mark.parametrize(
    ("variant", "mistake"),
    [*(("unpack", each) for each in BESIDE_MISTAKES), *(("prefill", each) for each in AHEAD_MISTAKES)],
)
def test_a_mistake_where_packed_weights_are_expanded_is_found(build: Build, variant: str, mistake: int):
    simulator = build(1, MXFP4_MISTAKES, weights=MXFP4)
    assert simulator.run(1, 100, 3, variant=variant).problem == ""
    problems = (simulator.run(seed, 100, 3, variant=variant, mutant=mistake).problem for seed in range(1, 41))
    assert any(problems)


def test_weights_are_unpacked_into_as_few_as_two_stages(tmp_path: Path):
    """Those that so many experts leave room for; tiles have five and three k-blocks."""
    shape = MoEShape(640, 384, 736, 1)
    assert KernelSpec(shape, Variant.UNPACK, weights=MXFP4).stages == 2
    simulator = Simulator.build(tmp_path, shape, 1, MXFP4_MISTAKES, weights=MXFP4)
    for mistake in (0, 229, 230):
        problem = simulator.run(1, 8, 2, launches=1, variant="unpack", mutant=mistake).problem
        assert (problem != "") == (mistake != 0), problem


def test_as_many_arrivals_are_expected_where_every_lane_arrives(build: Build):
    """In the kernels that racecheck judges; with one too few all wait for ever."""
    every_lane = Change(sanitize.ROOM, sanitize.ONE_LANE, sanitize.EVERY_LANE)
    simulator = build(1, (*SMALL, every_lane), weights=MXFP4)
    for variant in Variant.reading(MXFP4):
        for seed in (1, 2):
            assert simulator.run(seed, 60, 3, variant=variant.value).problem == ""


def test_rows_that_are_loaded_in_several_goes_come_whole(tmp_path: Path):
    """Of other ranks, where a block has helpers: not a whole row is held at once, nor the scales of eight rows."""
    simulator = Simulator.build(tmp_path, MoEShape(4480, 128, 4, 2), 2, weights=MXFP4)
    for seed in range(1, 5):
        assert simulator.run(seed, 30, 3, variant="unpack").problem == ""


def test_half_a_block_that_no_tile_wrote_is_still_read(tmp_path: Path):
    """Rings, tiles of 64 rows: the block between two users of a half may have had no tile there to wait."""
    simulator = Simulator.build(tmp_path, MoEShape(128, 128, 8, 3), 1)
    for seed in (173, 176, 242):
        run = simulator.run(seed, tokens=160, blocks=6, pool_rows=256, launches=1, variant="pingpong")
        assert run.problem == ""


def test_a_run_is_what_its_seed_says(build: Build):
    """So that a failure can be looked at again."""
    first, again, other = (build(2).run(seed, tokens=12, blocks=2) for seed in (5, 5, 6))
    assert first == again
    assert (first.problem, other.problem) == ("", "")
    assert first.counts["pairs"] != other.counts["pairs"]


def test_the_kernels_own_units_and_chunks(build: Build):
    """Nothing changed, pools as the package makes them; also compares the size of shared memory with Python's."""
    assert build(2, ()).run(3, tokens=100, blocks=3, launches=1, variant="mixed").problem == ""


def find(simulator: Simulator, mutant: int, tries: int = 20) -> str:
    """What the first run says that finds something wrong."""
    for seed in range(1, tries + 1):
        outcome = simulator.run(seed, tokens=40, blocks=2, pool_rows=256, mutant=mutant)
        if outcome.problem:
            return outcome.problem
    return ""


def test_nothing_is_found_where_nothing_is_wrong(build: Build):
    assert find(build(2, MISTAKES), 0, tries=6) == ""


WAITS = {wait.name.lower(): wait.value for wait in Wait}
WEAK = codes((HERE / "sim/machine.h").read_text(), "Weak")


@pytest.mark.parametrize("wait", [wait for wait in WAITS if wait != Wait.WEIGHTS_EXPANDED.name.lower()])
def test_a_wait_that_is_left_out_is_found(build: Build, wait: str):
    """Of the tail's barrier with one rank: who waits for all ranks waits for the last block of its own too."""
    alone = wait == "tail_barrier"
    simulator = build(1, MXFP4_MISTAKES, weights=MXFP4) if alone else build(2, MISTAKES)
    assert find(simulator, WAITS[wait]) != ""


@pytest.mark.parametrize("weak", [name for name, code in WEAK.items() if code])
def test_an_instruction_that_does_too_little_is_found(build: Build, weak: str):
    assert find(build(2, MISTAKES), WEAK[weak]) != ""


def test_data_that_is_read_too_early_is_named(build: Build):
    problem = find(build(2, MISTAKES), WAITS["pool_read"])
    assert re.search(r"race: .*rank \d block \d warp 2 writes act1_\w+ of rank \d .* without waiting for the", problem)
    problem = find(build(2, MISTAKES), WEAK["kNoProxyFence"])
    assert re.search(r"race: a copy of rank \d .* without a proxy fence since the write of rank \d", problem)


def test_ranks_that_do_not_wait_for_this_launch_are_found(build: Build):
    simulator = build(2, MISTAKES)
    assert "race: " in find(simulator, STALE_EPOCH)
    assert re.search(r"race: .* (reads|writes) expert_offsets of rank \d", find(simulator, NO_INPUTS))
    assert re.search(r"race: .* (reads combine|writes \w+) of rank \d", find(simulator, NO_RESULTS))


def test_a_row_is_not_copied_from_where_another_one_will_lie(build: Build):
    assert re.search(r"race: .* act1_pool of rank \d|wrong", find(build(2, MISTAKES), LOST_PLACE, tries=200))


def test_a_deadlock_says_who_waits_for_what(build: Build):
    """GEMM 1 wants rows of a ring that GEMM 2, with larger tickets, has not used yet."""
    problem = find(build(2, MISTAKES), BLIND_ORDER)
    assert problem.startswith("deadlock\n")
    assert "activations warp, waited in vain for the second GEMM to finish the rows from" in problem


@pytest.mark.parametrize("mistake", [LONELY_SIDE, OLD_SIDES, OTHER_SIDE])
def test_a_side_without_a_block_would_leave_its_tiles_undone(build: Build, mistake: int):
    assert find(build(2, MISTAKES), mistake) != ""


def functions(room: Path) -> set[str]:
    """Names of the functions that a header of instructions defines."""
    heads = re.findall(
        r"^(?! )(?:template <[^>]*> )?[\w ]+ (\w+)\(", host.without_comments(room.read_text()), re.MULTILINE
    )
    return set(heads)


@pytest.mark.parametrize("room", sorted(path.name for path in (host.KERNELS / "ptx").iterdir()))
def test_every_instruction_has_its_stand_in(room: str):
    real = functions(host.KERNELS / "ptx" / room)
    assert len(real) > 3
    assert real - functions(HERE / "shim/ptx" / room) == set(), "the simulation does not know these"


def test_a_text_that_has_changed_is_noticed(tmp_path: Path):
    with pytest.raises(AssertionError, match="adapt the simulation"):
        changed_rooms(tmp_path, [Change("comm/fault.cuh", "no such text", "")])
