"""Models' files to layers on the GPU: as stored, in the kernel's order, with shared experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

import megamoe_jit as mm
from megamoe_jit.checkpoints import convert, load_experts, load_shared_experts
from megamoe_jit.reference import calc_diff, moe_reference, with_shared_experts
from tests.checkpoints import model

EXPERTS, TOPK, TOKENS = 4, 2, 33


def inputs(device: torch.device, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(TOKENS, hidden, device=device).bfloat16()
    ids = torch.randint(EXPERTS, (TOKENS, TOPK), device=device)
    return x, ids, torch.rand(TOKENS, TOPK, device=device)


def joined(first, second):
    """Codes and scales of routed experts, and those of shared ones behind them."""
    codes, scales = (torch.cat([a.view(torch.uint8), b.view(torch.uint8)]) for a, b in zip(first, second, strict=True))
    return codes.view(first[0].dtype), scales.view(first[1].dtype)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4", "mixtral", "qwen3-moe"])
def test_a_layer_from_files_is_the_reference_of_them(tmp_path: Path, device: torch.device, name: str):
    source = model(name, hidden=512, intermediate=256)
    folder, shared = source.write(tmp_path), bool(source.shared)
    more = {"weight_format": "fp8"} if source.kind == "mxfp4" and shared else {}
    layer = mm.MegaMoE.from_checkpoint(folder, 1, max_tokens=128, shared_experts=shared, device=device, **more)
    x, ids, weights = inputs(device, 512)
    y = layer(x, ids, weights)
    layer.check()
    l1, l2 = load_experts(folder, 1, device=device, weight_format="fp8")
    if shared:
        beside = load_shared_experts(folder, 1, device=device)
        l1, l2 = (joined(*pair) for pair in zip((l1, l2), beside, strict=True))
        ids, weights = with_shared_experts(ids, weights, EXPERTS, 1)
    wanted = moe_reference(*mm.quantize_activations(x), ids, weights, l1, l2, activation_clamp=layer.clamp)
    assert calc_diff(y, wanted) < 1e-4


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4"])
def test_files_in_the_kernels_order_give_the_same_bits(tmp_path: Path, device: torch.device, name: str):
    folder = model(name, hidden=512, intermediate=256).write(tmp_path / "source")
    convert(folder, tmp_path / "ready", "megamoe", device=device)
    outputs = [
        mm.MegaMoE.from_checkpoint(each, 1, max_tokens=128, device=device)(*inputs(device, 512))
        for each in (folder, tmp_path / "ready")
    ]
    assert torch.equal(*outputs)
