"""One MoE layer through FlashInfer's expert-parallel interface, run by this kernel.

Run:   torchrun --nproc-per-node 2 examples/engines/flashinfer_layer.py
Seen:  from each rank the shape of its output, and exit code 0.
Needs: FlashInfer and a Hopper GPU for each rank; without FlashInfer one sentence, and exit code 3. Where the kernel
       does not fit, `megamoe-jit doctor --engine flashinfer` says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

import torch

from megamoe_jit.engines.flashinfer import MegaMoeConfig, register


def run(tokens: int) -> tuple[int, ...]:
    """One layer on random tokens; the shape of its output."""
    from flashinfer.moe_ep import BootstrapConfig, FleetParams, MegaConfig, MoEEpLayer, MoEEpTensors, MoEWeightPack

    register()
    experts, hidden, intermediate, topk = 64, 2048, 768, 4
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    w13 = 0.05 * torch.randn(experts // ranks, 2 * intermediate, hidden, **bf16)  # gate rows first, then up rows
    w2 = 0.05 * torch.randn(experts // ranks, hidden, intermediate, **bf16)
    fleet = FleetParams(num_experts=experts, max_tokens_per_rank=4096, token_hidden_size=hidden)
    backend = MegaConfig(megakernel=MegaMoeConfig(intermediate, topk))
    layer = MoEEpLayer(BootstrapConfig(ranks, rank), fleet, MoEWeightPack(w13, w2), backend=backend)
    weights, ids = torch.rand(tokens, experts, device="cuda").topk(topk)
    y = layer(MoEEpTensors(torch.randn(tokens, hidden, **bf16), ids, weights))
    torch.cuda.synchronize()
    layer.destroy()
    torch.distributed.destroy_process_group()
    return tuple(y.shape)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 3 without FlashInfer."""
    parser = argparse.ArgumentParser(description="One MoE layer through FlashInfer.")
    parser.add_argument("--tokens", type=int, default=100, help="of each rank")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("flashinfer") is None:
        print("flashinfer_layer.py: there is no FlashInfer; next: pip install flashinfer-python", file=sys.stderr)
        return 3
    print(f"rank {os.environ['RANK']}: {run(given.tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
