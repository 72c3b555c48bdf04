"""A pack that one CUDA major's NVRTC built runs where the other is installed and compiling is forbidden.

Needs two NVRTCs: the one that is found by itself, and one of another major, which MEGAMOE_JIT_NVRTC names::

    pip install --no-deps --target /tmp/nvrtc13 'nvidia-cuda-nvrtc>=13,<14'
    MEGAMOE_JIT_NVRTC=/tmp/nvrtc13/nvidia/cu13/lib/libnvrtc.so.13 python -m pytest tests/gpu/test_packs.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe_jit._diagnose.machine import gpus
from tests.gpu.harness import VARIANTS
from tests.packs import build, two_compilers, use

SIZES = (1024, 768, 16, 4)

CHILD = f"""
import json, torch
from megamoe_jit import KernelMissingError, KernelSpec, MoEShape, Variant
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._compile.toolchain import find_toolchain
from tests.gpu.harness import VARIANTS, Layer

layer = Layer(MoEShape(*{SIZES}), torch.device("cuda", torch.cuda.current_device()))
found = {{"here": find_toolchain().version[0], "calls": [], "kernels": []}}
for variant in ("auto", *VARIANTS):
    for tokens in (1, 77, 300, 513):
        inputs = layer.inputs(tokens)
        with layer.buffer(tokens) as buffer:
            y = layer.call(buffer, inputs, variant)
            buffer.check()
        verdict = layer.judge(y, inputs)
        found["calls"].append([variant, tokens, verdict.passed, verdict.reason])
for variant in VARIANTS:
    meta = get_kernel(KernelSpec(layer.shape, Variant(variant))).meta
    found["kernels"].append(int(meta["nvrtc"]["version"].split(".")[0]))
try:
    get_kernel(KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG))
except KernelMissingError:
    found["sealed"] = True
print(json.dumps(found))
"""


def test_a_pack_of_another_cuda_major_gives_right_answers(tmp_path: Path) -> None:
    here, other = two_compilers()
    driver = gpus().driver_cuda or "0"
    if int(driver.split(".")[0]) < other.major:
        pytest.skip(f"the driver supports CUDA {driver}, and takes no kernels of NVRTC {other.major}")
    found = use(CHILD, tmp_path, build(tmp_path, other, *SIZES))
    assert found["here"] == here.major
    assert found["sealed"], "a kernel that is not in the pack was compiled"
    assert found["kernels"] == [other.major] * len(VARIANTS)
    wrong = [call for call in found["calls"] if not call[2]]
    assert not wrong
    assert len(found["calls"]) == 12
