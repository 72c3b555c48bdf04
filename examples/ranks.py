"""Experts spread over several GPUs of one host, through the buffer interface: quantise, stage, call, check.

Run:   torchrun --nproc-per-node 2 examples/ranks.py     (as many ranks as GPUs, 8 at most)
       python examples/ranks.py                          (one rank that has all experts, without torch.distributed)
Seen:  a line for each rank: its tokens, the rows that its experts received, how far its output is from the reference
       (below 1e-3); and exit code 0.
Needs: a Hopper GPU (H100, H200) for each rank, each other's NVLink peers. Without them: one sentence that says what is
       missing, and exit code 3; torchrun ends the other ranks then, reports it at length, and ends with 1 itself.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist

import megamoe_jit as mm
from megamoe_jit.reference import calc_diff, moe_reference

EXPERTS, HIDDEN, INTERMEDIATE, TOPK, CAPACITY = 16, 256, 128, 4, 128


def draw(seed: int, *sizes: int, device: str) -> torch.Tensor:
    """Float32 of the standard normal distribution; the same on every rank for the same seed."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(device)


def run(device: str, rank: int, ranks: int) -> float:
    """One call on tokens of this rank's own; how far its output is from the reference."""
    # All experts, for the reference; a program loads only those of its rank.
    w13 = mm.quantize_weights(0.05 * draw(1, EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device))
    w2 = mm.quantize_weights(0.05 * draw(2, EXPERTS, HIDDEN, INTERMEDIATE, device=device))
    own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    l1, l2 = mm.transform_weights_for_mega_moe_sm90((w13[0][own], w13[1][own]), (w2[0][own], w2[1][own]))

    tokens = CAPACITY - 13 * rank  # ranks may have different numbers of tokens
    codes, scales = mm.quantize_activations(draw(3 + rank, tokens, HIDDEN, device=device))
    weights, ids = (
        draw(99 - rank, tokens, EXPERTS, device=device).softmax(dim=-1).topk(TOPK)
    )  # ids of all ranks' experts
    rows = torch.zeros(EXPERTS // ranks, dtype=torch.int32, device=device)

    group = dist.group.WORLD if ranks > 1 else None
    with mm.get_symm_buffer_for_mega_moe(group, EXPERTS, CAPACITY, TOPK, HIDDEN, INTERMEDIATE, device=device) as buffer:
        buffer.x[:tokens].copy_(codes)
        buffer.x_sf[:tokens].copy_(scales)
        buffer.topk_idx[:tokens].copy_(ids)
        buffer.topk_weights[:tokens].copy_(weights)
        y = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=device)
        mm.fp8_mega_moe(y, l1, l2, buffer, rows)  # on every rank, as often as on the others
        buffer.check()
    diff = calc_diff(y, moe_reference(codes, scales, ids, weights, w13, w2))
    print(
        f"rank {rank} of {ranks}: {tokens} tokens, {rows.sum().item()} rows, {diff:.1e} from the reference", flush=True
    )
    return diff


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 if the output is wrong, 3 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description="One MoE layer on the GPUs of a torchrun, or on one GPU without it.")
    parser.add_argument("--device", help="where, for one rank alone; with torchrun each rank has the GPU of its number")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    has_cuda = torch.cuda.is_available()
    device = parser.parse_args(arguments).device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if has_cuda else "cpu")
    try:
        if ranks > 1:
            if has_cuda:
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
        return int(not run(device, rank, ranks) < 1e-3)
    except mm.UnsupportedDeviceError as error:
        print(f"ranks.py: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 3
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
