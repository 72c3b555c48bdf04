"""A kernel that waits for something that never comes must say who waited for what, and stop.

Each case breaks one line of the kernel sources, so that a signal is never given, and runs in a process of its own: a
kernel that gives up ends the CUDA context.  A process that has not ended after 100 seconds fails its test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe_jit._compile.render import kernels_dir
from megamoe_jit._spec import FP8, MXFP4, Variant

CHILD = """
import json, sys, torch
from dataclasses import replace
import megamoe_jit as mm
from megamoe_jit._check.scenarios import get, make_inputs

scenario = replace(get("L2.heur.small.t64"), weights=sys.argv[2])
s = scenario.shape
inputs = make_inputs(scenario, "cuda")
l1, l2 = mm.transform_weights_for_mega_moe_sm90(inputs.l1, inputs.l2)
buffer = mm.get_symm_buffer_for_mega_moe(None, s.experts, 64, s.topk, s.hidden, s.intermediate)
buffer.x[:64].copy_(inputs.x_q), buffer.x_sf[:64].copy_(inputs.x_sf)
buffer.topk_idx[:64].copy_(inputs.topk_idx), buffer.topk_weights[:64].copy_(inputs.topk_weights)
y = torch.empty(64, s.hidden, dtype=torch.bfloat16, device="cuda")
try:
    mm.fp8_mega_moe(y, l1, l2, buffer, variant=sys.argv[1], num_sms=int(sys.argv[3]))
    buffer.check()
    print(json.dumps({"error": None}))
except mm.MegaMoeError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""

#: What never happens: the file, the line that is broken, what takes its place, and what the message must say.
BROKEN = {
    "dispatch never counts its rows": (
        "dispatch/gather.cuh",
        "if (ptx::lane_id() == 0)\n            ptx::add_release(",
        "if (ptx::lane_id() == 99)\n            ptx::add_release(",
        "dispatch to bring the rows",
    ),
    "finished tiles are never announced": (
        "roles/publish.cuh",
        "ptx::add_release(counters + (tile.row + r) / kCounterRows, 1);",
        "{}",
        "the first GEMM to finish",
    ),
    "math warps never free a stage": (
        "mma/stages.cuh",
        "if (arrives(thread)) ptx::mbarrier_arrive(shared.empty(stage));",
        "",
        "the math warps to free pipeline stage",
    ),
    "math warps never finish a tile": (
        "pipe/tile_slots.cuh",
        "ptx::mbarrier_arrive(shared.tile_stored(index % kTileSlots));",
        "",
        "the math warps to finish tile",
    ),
    "expanded weights are never counted": (
        "expand/ahead.cuh",
        "            ptx::add_release(p.expanded + column, 1);",
        "            ",
        "packed weights of column",
    ),
    "one block stays away from the grid barrier": (
        "comm/barriers.cuh",
        "    u32* word = p.control + kControlGridBarrier;",
        "    while (blockIdx.x == 3 && which == 1) __nanosleep(1000);\n"
        "    u32* word = p.control + kControlGridBarrier;",
        "blocks of the launch to reach grid barrier 1",
    ),
}


#: Of one variant alone.
OF_ONE = {"expanded weights are never counted": "prefill"}
#: Blocks of a launch: few enough for each to use every one of its stages again.
BLOCKS = 16
KINDS = [(variant.value, stored.name) for stored in (FP8, MXFP4) for variant in Variant.reading(stored)]


def broken_kernels(name: str, folder: Path) -> tuple[dict[str, str], str]:
    """The environment of a process with such kernels, and what its message must say."""
    room, line, broken, sentence = BROKEN[name]
    shutil.copytree(kernels_dir(), folder / "kernels_src")
    source = (folder / "kernels_src" / room).read_text()
    assert source.count(line) == 1, f"{room} no longer has the line that this test breaks"
    (folder / "kernels_src" / room).write_text(source.replace(line, broken))
    environment = {
        **os.environ,
        "MEGAMOE_JIT_KERNELS_SRC": str(folder / "kernels_src"),
        "MEGAMOE_JIT_CACHE_DIR": str(folder / "cache"),
        "MEGAMOE_JIT_TIMEOUT_S": "1",
    }
    return environment, sentence


def started(
    environment: dict[str, str], variant: str = "cooperative", weights: str = FP8.name
) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-c", CHILD, variant, weights, str(BLOCKS)], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def said(child: subprocess.Popen[str]) -> str:
    """The text of the child's `DeviceFaultError`; a child that does not end is killed."""
    try:
        out, errors = child.communicate(timeout=100)
    finally:
        child.kill()
    assert child.returncode == 0, errors[-2000:]
    result = json.loads(out.splitlines()[-1])
    assert result["error"] == "DeviceFaultError", result
    text = result["text"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("name", "variant", "weights"),
    [(name, *kind) for name in BROKEN for kind in KINDS if OF_ONE.get(name, kind[0]) == kind[0]],
)
def test_a_wait_in_vain_ends_in_a_sentence(name: str, variant: str, weights: str, tmp_path: Path) -> None:
    environment, sentence = broken_kernels(name, tmp_path)
    text = said(started(environment, variant, weights))
    assert sentence in text
    assert "rank 0: block " in text


def test_the_driver_notices_every_end_where_processes_share_the_gpu(tmp_path: Path) -> None:
    """Of kernels that ended themselves by `trap` it lost one or more in every such round of eight."""
    environment, _ = broken_kernels("dispatch never counts its rows", tmp_path)
    texts = [said(child) for child in [started(environment) for _ in range(8)]]
    for text in texts:  # whoever is late first, where eight kernels take turns
        assert "waited in vain for" in text
        assert "The driver has not noticed" not in text
