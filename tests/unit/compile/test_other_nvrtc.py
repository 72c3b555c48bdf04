"""Kernels of one CUDA major's NVRTC, taken in a pack to where another major's is installed; no GPU needed."""

from __future__ import annotations

from pathlib import Path

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._jit.pack import export_pack
from tests.commandline import PINGPONG
from tests.packs import NVRTC, build, command, two_compilers, use

CHILD = """
import json
from megamoe_jit import KernelMissingError, KernelSpec, MoEShape, Variant
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._compile.toolchain import find_toolchain

kernels = [get_kernel(KernelSpec(MoEShape(256, 128, 8, 2), variant))
           for variant in (Variant.PINGPONG, Variant.COOPERATIVE)]
try:
    get_kernel(KernelSpec(MoEShape(256, 128, 8, 3), Variant.PINGPONG))
except KernelMissingError:
    missing = True
print(json.dumps({"here": find_toolchain().version[0], "missing": missing, "kernels": [
    [kernel.origin, int(kernel.meta["nvrtc"]["version"].split(".")[0]), len(kernel.cubin)] for kernel in kernels]}))
"""


def test_kernels_of_another_major_are_found_where_compiling_is_forbidden(tmp_path):
    here, other = two_compilers()
    found = use(CHILD, tmp_path, build(tmp_path, other, 256, 128, 8, 2))
    assert (found["here"], found["missing"]) == (here.major, True)
    assert [(origin, major) for origin, major, _ in found["kernels"]] == [("pack", other.major)] * 2
    assert all(size > 10_000 for *_, size in found["kernels"])
    assert not (tmp_path / "empty").exists()


def test_cache_commands_find_kernels_of_another_major_by_name(tmp_path: Path):
    """As in tests/unit/cli/test_cli_by_spec.py, but with kernels that another compiler has really built."""
    _, other = two_compilers()
    sizes = ("--hidden", 256, "--intermediate", 128, "--experts", 4, "--topk", 1)
    built = command("warmup", *sizes, "--cache-dir", tmp_path / "build", **{NVRTC: other.path})
    export_pack(tmp_path / "k.tar", cache=KernelCache(tmp_path / "build"))
    here = {"MEGAMOE_JIT_CACHE_DIR": tmp_path / "here"}
    command("cache", "import", tmp_path / "k.tar", **here)
    keys = {each["kernel"]: each["key"] for each in built["kernels"]}
    assert command("cache", "info", PINGPONG, **here)["entry"]["key"] == keys[PINGPONG]
    assert command("cache", "export", tmp_path / "k.tar", PINGPONG, **here)["kernels"][0]["key"] == keys[PINGPONG]
    assert command("cache", "rm", PINGPONG, **here)["removed"] == [keys[PINGPONG]]
