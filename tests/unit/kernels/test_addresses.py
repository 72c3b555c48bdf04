"""Addresses of large layers: offsets beyond 4 GiB, which 32 bits would wrap, computed by the kernels' own code."""

from __future__ import annotations

import subprocess

import pytest

from tests import host

HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 7168, 16384, 768, 32  #: half of the experts on each of two ranks
LOCAL, TOKENS, POOL_ROWS = EXPERTS // 2, 32768, 1 << 20
GIB4 = 1 << 32

WEIGHTS1, WEIGHTS2 = LOCAL * 2 * INTERMEDIATE * HIDDEN, LOCAL * HIDDEN * INTERMEDIATE
#: By name: from the beginning of a section or matrix to the last row, tile of 256 rows, or piece in it.
EXPECTED = {
    "combine": (TOKENS * TOPK - 1) * HIDDEN * 2,
    "x": (TOKENS - 1) * HIDDEN,
    "x_scales": (TOKENS - 1) * HIDDEN // 128 * 4,
    "weight1": WEIGHTS1 - 256 * HIDDEN,
    "weight2": WEIGHTS2 - 256 * INTERMEDIATE,
    "weight1_packed": (WEIGHTS1 - 256 * HIDDEN) // 2,
    "weight1_exponents": (WEIGHTS1 - 256 * HIDDEN) // 32,
    "act1_pool": (POOL_ROWS - 1) * HIDDEN,
    "packed1": (WEIGHTS1 - 64 * 128) // 2,
    "expanded1": WEIGHTS1 - 64 * 128,
    "expanded2": WEIGHTS2 - 64 * 128,
}
NEAR = {"x", "x_scales", "weight1_exponents"}  #: below 4 GiB with these sizes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    sizes = {"HIDDEN": HIDDEN, "INTERMEDIATE": INTERMEDIATE, "EXPERTS": EXPERTS, "TOPK": TOPK, "TOKENS": TOKENS}
    options = [f"-D{name}={value}" for name, value in {**sizes, "POOL_ROWS": POOL_ROWS, "BLOCK_WARPS": 12}.items()]
    paths = ("-iquote", str(host.SOURCES), "-iquote", str(host.SOURCES / "shim"))
    target = tmp_path_factory.mktemp("addresses") / "addresses"
    host.build(host.SOURCES / "addresses.cpp", target, "-O0", "-Wno-unknown-pragmas", "-Wno-unused", *options, *paths)
    lines = subprocess.run([target], capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return {name: int(number) for name, number in (line.split() for line in lines)}


def test_every_address_is_far_enough_to_tell():
    assert {name for name, offset in EXPECTED.items() if offset < GIB4} == NEAR


def test_offsets_beyond_4_gib_do_not_wrap(found: dict[str, int]):
    assert found == EXPECTED
