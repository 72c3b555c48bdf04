"""The experts of one layer of a model, from its safetensors files to outputs, held against the FP32 reference.

Run:   python examples/checkpoint.py --path DeepSeek-V3 --layer 3
       python examples/checkpoint.py            (on a small model that it makes and deletes)
Seen:  how many experts were read, the output's shape, how far it is from the reference (below 1e-3), exit code 0.
Needs: a Hopper GPU (H100, H200), safetensors, and a model whose layer fits its memory. Without the GPU: one sentence
       that says what is missing, and exit code 3; of a model or an argument that cannot be used, why, and exit code 2.
       `megamoe-jit inspect-checkpoint PATH` needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from megamoe_jit import MegaMoE, MegaMoeError, UnsupportedDeviceError, quantize_activations, quantize_weights
from megamoe_jit.checkpoints import inspect, load_experts
from megamoe_jit.reference import calc_diff, moe_reference


def write_small_model(folder: Path) -> None:
    """Four experts named and stored as in DeepSeek-V3: FP8 with a scale for 128 x 128."""
    from safetensors.torch import save_file

    shapes = {"gate_proj": (256, 512), "up_proj": (256, 512), "down_proj": (512, 256)}
    tensors = {}
    for expert in range(4):
        for part, shape in shapes.items():
            name = f"model.layers.3.mlp.experts.{expert}.{part}"
            codes, scales = quantize_weights(0.05 * torch.randn(shape))
            tensors.update({f"{name}.weight": codes, f"{name}.weight_scale_inv": scales})
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"num_experts_per_tok": 2, "n_routed_experts": 4, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def run(path: Path, number: int, device: str, topk: int | None) -> float:
    """One layer on random tokens; how far its output is from the reference."""
    w13, w2 = load_experts(path, number, device=device, weight_format="fp8")  # codes and scales, as MegaMoE takes them
    found, tokens = inspect(path, experts=0), 100
    topk = topk or found.topk or 2
    layer = MegaMoE(w13, w2, topk=topk, max_tokens=4096, clamp=found.clamp)
    experts, _, hidden = w13[0].shape
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    topk_weights, topk_idx = torch.randn(tokens, experts, device=device).softmax(dim=-1).topk(topk)
    y = layer(x, topk_idx, topk_weights)
    layer.check()
    inputs = *quantize_activations(x), topk_idx, topk_weights
    diff = calc_diff(y, moe_reference(*inputs, w13, w2, activation_clamp=layer.clamp))
    print(f"{experts} experts of layer {number}, {tuple(y.shape)}, {diff:.1e} from the reference")
    layer.destroy()
    return diff


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if the output is wrong, 2 if the model cannot be used, 3 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description="A layer from a model's safetensors files, checked.")
    parser.add_argument("--path", type=Path, help="a folder as one fetches it; a small one is made by default")
    parser.add_argument("--layer", type=int, default=3, help="its number in the names of tensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where; e.g. cuda:1")
    parser.add_argument("--topk", type=int, help="experts of a token; by default as config.json says, else 2")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.path is None:
            write_small_model(Path(folder))
        try:
            return int(not run(options.path or Path(folder), options.layer, options.device, options.topk) < 1e-3)
        except MegaMoeError as error:
            print(f"checkpoint.py: {error}", file=sys.stderr)
            return 3 if isinstance(error, UnsupportedDeviceError) else 2


if __name__ == "__main__":
    sys.exit(main())
