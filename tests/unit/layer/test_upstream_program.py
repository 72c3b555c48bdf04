"""A program for DeepGEMM's SM90 mega MoE, as far as a CPU goes: a stand-in for the kernel computes."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit._device.params import Params
from megamoe_jit._layer import calls as _api
from megamoe_jit.reference import expert_counts, moe_reference
from tests.unit.layer.test_calls import HERE, Cuda, cuda  # noqa: F401
from tests.unit.layer.test_moe import F32, FP8, at

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def test_it_runs_unchanged(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "deep_gemm", mm)
    monkeypatch.delitem(sys.modules, "tests.upstream_program", raising=False)
    monkeypatch.setattr(_api, "place_of", lambda device: HERE)
    program = importlib.import_module("tests.upstream_program")
    experts, topk, hidden, intermediate = program.EXPERTS, program.TOPK, program.HIDDEN, program.INTERMEDIATE

    def compute(params: Params) -> None:
        tokens, base = params.tokens, params.peers[0]
        if tokens == 0:
            return
        ids = at(base + params.topk_ids, torch.int64, tokens, topk)
        staged = (
            at(base + params.x, FP8, tokens, hidden),
            at(base + params.x_scales, F32, tokens, hidden // 128),
            ids,
            at(base + params.topk_weights, F32, tokens, topk),
        )
        l1 = (
            at(params.weight1, FP8, experts, 2 * intermediate, hidden),
            at(params.weight1_scales, F32, experts, intermediate // 64, hidden // 128),
        )
        l2 = (
            at(params.weight2, FP8, experts, hidden, intermediate),
            at(params.weight2_scales, F32, experts, hidden // 128, intermediate // 128),
        )
        mm.mark_transformed(l1, l2)
        weights = mm.inverse_transform_weights_for_mega_moe_sm90(l1, l2)
        y = at(params.y, torch.bfloat16, tokens, hidden)
        y.copy_(moe_reference(*staged, *weights, activation_clamp=params.clamp))
        at(params.stats, torch.int32, experts).add_(expert_counts(ids, experts))

    cuda.kernel = compute
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        program.run(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert [launch.params.tokens for launch in cuda.launches] == [60, 0, 7]
