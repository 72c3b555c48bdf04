"""What a kernel is compiled for: limits, shared memory, names, and the way to JSON and back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.render import render
from megamoe_jit._compile.toolchain import find_toolchain
from megamoe_jit._errors import ConfigError
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import MAX_EXPERTS, MAX_TOPK, KernelSpec, MoEShape, Variant
from megamoe_jit._spec import abi as _abi
from megamoe_jit._spec.formats import FP8, MXFP4, WeightFormat
from megamoe_jit._spec.spec import MAX_DISPATCH_SLOTS, MIN_DISPATCH_SLOTS
from tests import host
from tests.stubs import REPO

SHAPE = MoEShape(4096, 2048, 256, 6)

specs = st.builds(
    lambda h, i, local, ranks, k, variant, fast, shared: KernelSpec(
        MoEShape(*(128 * h, 128 * i, min(local, MAX_EXPERTS // ranks - shared) * ranks, k, min(shared, MAX_TOPK - k))),
        *(variant, ranks, fast),
    ),
    st.integers(1, 128),
    st.integers(1, 64),
    st.integers(1, MAX_EXPERTS),
    st.integers(1, 8),
    st.integers(1, MAX_TOPK),
    st.sampled_from(Variant.reading(FP8)),
    st.booleans(),
    st.sampled_from((0, 0, 1, 2, 5)),
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden", 2880, "hidden = 2880 is not supported; allowed: a multiple of 128 from 128 to 262144"),
        ("hidden", 0, "hidden = 0 is not supported; allowed: a multiple of 128 from 128 to 262144"),
        ("hidden", -128, "hidden = -128 is not supported; allowed: a multiple of 128 from 128 to 262144"),
        ("intermediate", 100, "intermediate = 100 is not supported; allowed: a multiple of 128 from 128 to 262144"),
        ("intermediate", 0, "intermediate = 0 is not supported; allowed: a multiple of 128 from 128 to 262144"),
        ("topk", 0, "topk = 0 is not supported; allowed: 1 to 32"),
        ("topk", 33, "topk = 33 is not supported; allowed: 1 to 32"),
        ("experts", 0, "experts = 0 is not supported; allowed: 1 to 1024"),
        ("experts", 1025, "experts = 1025 is not supported; allowed: 1 to 1024"),
        (
            "shared",
            -1,
            "shared = -1 is not supported; allowed: 0 to 26, for 32 slots and 1024 experts with those of the router",
        ),
        (
            "shared",
            27,
            "shared = 27 is not supported; allowed: 0 to 26, for 32 slots and 1024 experts with those of the router",
        ),
    ],
)
def test_sizes_out_of_range_are_refused_with_value_and_range(field, value, message):
    with pytest.raises(ConfigError) as caught:
        replace(SHAPE, **{field: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (3, "experts = 256 is not supported; allowed: a multiple of the number of ranks (3)"),
        (0, "ranks = 0 is not supported; allowed: 1 to 8"),
        (9, "ranks = 9 is not supported; allowed: 1 to 8"),
    ],
)
def test_ranks_out_of_range_are_refused_with_value_and_range(ranks, message):
    with pytest.raises(ConfigError) as caught:
        KernelSpec(SHAPE, Variant.PINGPONG, ranks)
    assert str(caught.value) == message


@pytest.mark.parametrize("sizes", [(128, 128, 1, 1), (1408, 768, 1024, 32), (2304, 1408, 512, 12)])
def test_limits_are_allowed(sizes):
    assert MoEShape(*sizes).hidden == sizes[0]


def test_an_unknown_variant_is_refused_with_the_names():
    with pytest.raises(ConfigError, match="unknown kernel variant 'fast'; allowed: pingpong, cooperative"):
        Variant.parse("fast")
    assert [Variant.parse(v.value) for v in Variant] == list(Variant)


@given(specs)
def test_json_and_back(spec):
    assert KernelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(st.lists(specs, min_size=2, max_size=20, unique=True))
def test_entries_are_symbols_and_differ(several):
    names = [spec.kernel_name for spec in several]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z_]\w*", name, re.ASCII) for name in names)
    assert all(spec.template_variables()["kernel_name"] == spec.kernel_name for spec in several)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden", 640), ("intermediate", 640), ("experts", 640), ("topk", 31), ("shared", 19)]
)
def test_every_size_is_in_the_name(field, value):
    spec = KernelSpec(SHAPE, Variant.PINGPONG)
    assert str(value) not in spec.kernel_name
    assert str(value) in replace(spec, shape=replace(SHAPE, **{field: value})).kernel_name


def test_all_ranks_shared_experts_count_as_experts():
    shape = replace(SHAPE, experts=1016, shared=2)
    assert KernelSpec(shape, Variant.PINGPONG, 4).local_experts == 256
    with pytest.raises(ConfigError, match="shared = 2 is not supported; allowed: 0 to 1, for 1024 experts on 8 ranks"):
        KernelSpec(shape, Variant.PINGPONG, 8)


def test_a_kernel_without_shared_experts_says_nothing_of_them():
    """So its name, its key and its documents are what they were."""
    plain, spec = (KernelSpec(replace(SHAPE, shared=n), Variant.PINGPONG, 8) for n in (0, 3))
    assert "shared" not in json.dumps(plain.to_json()["shape"])
    assert spec.kernel_name == plain.kernel_name.replace("_k6_", "_k6_s3_")
    assert [KernelSpec.of_kernel_name(each.kernel_name) for each in (plain, spec)] == [plain, spec]
    assert KernelSpec.of_kernel_name(spec.kernel_name.replace("_s3_", "_s0_")) is None


@given(specs)
def test_shared_memory_fits(spec):
    assert spec.shared_bytes <= _abi.SHARED_LIMIT == 232448
    assert spec.shared_bytes % 8 == 0
    assert spec.stages >= 3
    assert MIN_DISPATCH_SLOTS <= spec.dispatch_slots <= MAX_DISPATCH_SLOTS
    assert spec.block_m == (128 if spec.variant is Variant.COOPERATIVE else 64)


#: Widest and narrowest of everything that the sum depends on.
MAPPED = [
    KernelSpec(MoEShape(256, 128, experts, 2), variant, ranks, weights=weights)
    for weights in (FP8, MXFP4)
    for variant in Variant.reading(weights)
    for experts, ranks in ((1, 1), (7, 1), (32, 1), (48, 1), (256, 8), (256, 1), (384, 1), (512, 1), (1024, 1))
]
ENTRY = """
#include "ptx/convert.cuh"
#include "formats/fp8e5m2.cuh"
#include "formats/mxfp4.cuh"

using megamoe::u32;
template <class W, u32 kM, u32 kE, u32 kR, u32 kS, u32 kD, u32 kH> struct Config {
    struct Policy {
        static constexpr u32 kHelpers = kH;
    };
    using Weights = W;
    static constexpr u32 kBlockM = kM, kStages = kS, kDispatchSlots = kD;
    static constexpr u32 kHidden = 256, kIntermediate = 128, kTopK = 2;
    static constexpr u32 kExperts = kE, kRanks = kR, kLocalExperts = kExperts / kRanks;
    static constexpr bool kFastMath = true;
};
template <class C, u32 kExpected> struct Check {
    using Map = megamoe::Shared<C>;
    static_assert(Map::kBytes == kExpected, "the two sums differ");
    static_assert(Map::kActBytes % 1024 == 0 && Map::kWeightBytes % 1024 == 0, "swizzle atoms are 1024 bytes");
    static_assert(Map::kStagingAt % 128 == 0 && Map::kDispatchAt % 16 == 0, "16-byte accesses, bulk copies");
    static_assert(Map::kScaleAt % 16 == 0 && Map::kScaleBytes % 16 == 0 && Map::kActScaleBytes % 16 == 0, "bulk");
    static_assert(Map::kBarrierAt % 8 == 0 && Map::kTileBarrierAt % 8 == 0, "mbarriers");
    static_assert(Map::kDispatchBarrierAt % 8 == 0 && Map::kPackedBarrierAt % 8 == 0, "mbarriers");
    static_assert(Map::kExponentAt % 16 == 0 && Map::kExponentBytes % 16 == 0, "bulk copies");
    static_assert(Map::kPackedAt % 128 == 0 && Map::kPackedBytes % 16 == 0, "bulk copies");
    static_assert(Map::kTileSlotAt % 8 == 0 && Map::kRowsAt % 4 == 0, "words");
    static constexpr bool kOk = true;
};
@CHECKS@
extern "C" __global__ void {{ kernel_name }}() {}
"""


@pytest.mark.parametrize(
    ("variant", "weights"), [*((each, FP8) for each in Variant.reading(FP8)), (Variant.WIDE, MXFP4)]
)
@pytest.mark.parametrize("local", [32, 48, 96])
def test_shared_memory_does_not_shrink_with_the_ranks(variant: Variant, weights: WeightFormat, local: int):
    """Of so many experts on each: as many stages, and copies of rows in flight, on eight ranks as on one."""
    alone, *others = (
        KernelSpec(MoEShape(4096, 2048, ranks * local, 6), variant, ranks, weights=weights) for ranks in (1, 2, 4, 8)
    )
    for spec in others:
        assert (spec.stages, spec.dispatch_slots, spec.shared_bytes) == (
            alone.stages,
            alone.dispatch_slots,
            alone.shared_bytes,
        )
    assert alone.dispatch_slots >= (4 if local <= 48 else 3)


def test_the_kernels_count_the_same_shared_memory(tmp_path):
    """Also asserted in every kernel; here for many expert counts in one compilation, with the alignments."""
    shutil.copytree(host.KERNELS, tmp_path / "src")
    checks = "\n".join(
        f"static_assert(Check<Config<megamoe::{s.staged.policy}, {s.block_m}, {s.shape.experts}, {s.ranks}, "
        f"{s.stages}, {s.dispatch_slots}, {s.variant.helpers}>, "
        f'{s.shared_bytes}>::kOk, "");'
        for s in MAPPED
    )
    (tmp_path / "src" / "kernels" / "entry.cuh.j2").write_text(ENTRY.replace("@CHECKS@", checks))
    spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
    with override(kernels_src=tmp_path / "src"):
        text = render(spec).text
    assert (
        compile_source(text, kernel_name=spec.kernel_name, toolchain=find_toolchain()).kernel.name == spec.kernel_name
    )


def test_a_spec_of_another_process_is_found_among_those_of_this_one():
    """Hashes of text and of objects are others there."""
    code = (
        "import pickle, sys; from megamoe_jit._spec import *\n"
        "spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)\n"
        "hash(spec), spec.kernel_name, spec.shared_bytes\n"
        "sys.stdout.buffer.write(pickle.dumps(spec))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONHASHSEED": "1"}
    sent = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True).stdout
    here, there = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG), pickle.loads(sent)
    assert {here: "kernel"}[there] == "kernel"
    assert len({here, there, copy.deepcopy(here), copy.copy(there)}) == 1
