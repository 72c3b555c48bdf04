"""One MoE layer in fifteen lines: bf16 weights and tokens in, one call, bf16 out, held against the FP32 reference.

Run:   python examples/layer.py
Seen:  the output's dtype and shape, how far it is from the reference (below 1e-3), and exit code 0. The first run
       compiles a kernel, which takes a second or two; later ones find it in the cache.
Needs: a Hopper GPU (H100, H200). Without one: one sentence that says what is missing, and exit code 3.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megamoe_jit import MegaMoE, UnsupportedDeviceError, quantize_activations, quantize_weights
from megamoe_jit.reference import calc_diff, moe_reference


def run(device: str) -> float:
    """One layer on random tokens; how far its output is from the reference."""
    experts, hidden, intermediate, topk, tokens = 8, 512, 256, 2, 100
    bf16 = {"device": device, "dtype": torch.bfloat16}
    w13 = 0.05 * torch.randn(experts, 2 * intermediate, hidden, **bf16)  # gate rows first, then up rows
    w2 = 0.05 * torch.randn(experts, hidden, intermediate, **bf16)
    layer = MegaMoE(w13, w2, topk=topk, max_tokens=4096)  # quantises to FP8, once
    x = torch.randn(tokens, hidden, **bf16)
    topk_weights, topk_idx = torch.randn(tokens, experts, device=device).softmax(dim=-1).topk(topk)
    y = layer(x, topk_idx, topk_weights)
    layer.check()  # waits for the GPU; raises if the kernel gave up
    l1, l2 = quantize_weights(w13), quantize_weights(w2)
    diff = calc_diff(y, moe_reference(*quantize_activations(x), topk_idx, topk_weights, l1, l2))
    print(f"{y.dtype} {tuple(y.shape)}, {diff:.1e} from the reference")
    layer.destroy()
    return diff


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if the output is wrong, 3 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description="One MoE layer: bf16 in, one call, bf16 out, checked.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where; e.g. cuda:1")
    try:
        return int(not run(parser.parse_args(arguments).device) < 1e-3)
    except UnsupportedDeviceError as error:
        print(f"layer.py: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
