"""A layer in a CUDA graph: prepared, captured once, replayed with new inputs.

Run:   python examples/cuda_graph.py
Seen:  for each replay whether its output has the bits of an eager call with the same inputs, which it has; exit code 0.
Needs: a Hopper GPU (H100, H200). Without one: one sentence that says what is missing, and exit code 3.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megamoe_jit import MegaMoE, UnsupportedDeviceError

EXPERTS, HIDDEN, INTERMEDIATE, TOPK, TOKENS = 8, 256, 128, 2, 64


def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x bf16 ``[T, H]``, topk_idx int64 ``[T, K]`` and topk_weights float32 ``[T, K]``."""
    weights, ids = torch.randn(TOKENS, EXPERTS, device=device).softmax(dim=-1).topk(TOPK)
    return torch.randn(TOKENS, HIDDEN, device=device).bfloat16(), ids, weights


def run(device: str, replays: int) -> bool:
    """Whether every replay gives the same bits as an eager call."""
    w13 = 0.05 * torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device)
    w2 = 0.05 * torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, device=device)
    layer = MegaMoE(w13, w2, topk=TOPK, max_tokens=TOKENS)
    layer.buffer.prepare_all()  # compiles and loads now: a capture cannot wait for it
    fixed = inputs(device)  # a replay reads these tensors again
    layer(*fixed)  # what torch sets up at its first use must not happen in a capture either
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*fixed)

    right = True
    for number in range(replays):
        fresh = inputs(device)
        eager = layer(*fresh)
        for old, new in zip(fixed, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        layer.check()
        same = torch.equal(y.view(torch.int16), eager.view(torch.int16))
        print(f"replay {number + 1}: {'the bits of an eager call' if same else 'OTHER BITS than an eager call'}")
        right &= same
    del graph
    layer.destroy()
    return right


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if an output is wrong, 3 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description="A layer in a CUDA graph, replayed with new inputs.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    parser.add_argument("--replays", type=int, default=3, help="how many; 3 by default")
    given = parser.parse_args(arguments)
    try:
        return int(not run(given.device, given.replays))
    except UnsupportedDeviceError as error:
        print(f"cuda_graph.py: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
