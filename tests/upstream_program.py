"""A program written for DeepGEMM's SM90 mega MoE, which knows nothing of this package: one process for each rank.

It draws a layer, quantises it by itself, stages, calls, and compares with the layer in plain FP32. What starts it puts
a package under the name `deep_gemm`, and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun does.
"""

import os
import sys

import deep_gemm
import torch
import torch.distributed as dist

EXPERTS, TOPK, HIDDEN, INTERMEDIATE, MAX_TOKENS, CLAMP = 8, 2, 256, 128, 60, 10.0


def cast_to_fp8(x, rows):
    """Codes and float32 scales, one for each block of `rows` x 128."""
    *lead, n, k = x.shape
    blocks = x.float().view(*lead, n // rows, rows, k // 128, 128)
    scales = blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp(1e-4) / 448.0
    codes = (blocks / scales).view(x.shape).to(torch.float8_e4m3fn)
    return codes, scales.view(*lead, n // rows, k // 128)


def cast_back(codes, scales, rows):
    *lead, n, k = codes.shape
    blocks = codes.float().view(*lead, n // rows, rows, k // 128, 128)
    return (blocks * scales.view(*lead, n // rows, 1, k // 128, 1)).view(codes.shape)


def plain_layer(x, topk_idx, topk_weights, w13, w2):
    """The layer in FP32, without the rounding inside."""
    y = torch.zeros(x.shape[0], HIDDEN, dtype=torch.float32)
    for slot in range(TOPK):
        for expert in range(EXPERTS):
            rows = (topk_idx[:, slot] == expert).nonzero().flatten()
            gate, up = (x[rows] @ w13[expert].T).chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate.clamp(max=CLAMP)) * up.clamp(-CLAMP, CLAMP)
            y[rows] += topk_weights[rows, slot, None] * (hidden @ w2[expert].T)
    return y


def difference(a, b):
    a, b = a.double(), b.double()
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


class Layer:
    """The experts of this rank, as a serving engine keeps them."""

    def __init__(self, group, w13, w2):
        local = EXPERTS // group.size()
        mine = slice(group.rank() * local, (group.rank() + 1) * local)
        l1, l2 = deep_gemm.transform_weights_for_mega_moe_sm90(tuple(t[mine] for t in w13), tuple(t[mine] for t in w2))
        parameter = lambda pair: tuple(torch.nn.Parameter(t, requires_grad=False) for t in pair)  # noqa: E731
        self.l1, self.l2 = parameter(l1), parameter(l2)
        self.stats = torch.zeros(local, dtype=torch.int)
        self.buffer = deep_gemm.get_symm_buffer_for_mega_moe(
            group, EXPERTS, MAX_TOKENS, TOPK, HIDDEN, INTERMEDIATE, num_shared_experts=0, activation="swiglu"
        )

    def __call__(self, x, x_sf, topk_idx, topk_weights):
        tokens = x.shape[0]
        assert tokens <= self.buffer.num_max_tokens_per_rank
        self.buffer.x[:tokens].copy_(x)
        self.buffer.x_sf[:tokens].copy_(x_sf)
        self.buffer.topk_idx[:tokens].copy_(topk_idx)
        self.buffer.topk_weights[:tokens].copy_(topk_weights)
        y = torch.empty((tokens, HIDDEN), dtype=torch.bfloat16)
        deep_gemm.fp8_mega_moe(
            y,
            l1_weights=tuple(t.data for t in self.l1),
            l2_weights=tuple(t.data for t in self.l2),
            sym_buffer=self.buffer,
            cumulative_local_expert_recv_stats=self.stats,
            recipe=(128, 128, 128),
            activation="swiglu",
            activation_clamp=CLAMP,
            fast_math=True,
        )
        return y


def run(group):
    """Calls of several sizes; raises if one is wrong."""
    torch.manual_seed(0)  # every rank draws all experts
    w13 = cast_to_fp8(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * 0.05, 128)
    w2 = cast_to_fp8(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * 0.05, 128)
    layer, sent = Layer(group, w13, w2), torch.zeros(EXPERTS, dtype=torch.int)
    torch.manual_seed(1 + group.rank())
    for tokens in (MAX_TOKENS, 0, 7):
        x = cast_to_fp8(torch.randn(tokens, HIDDEN), 1)
        topk_weights, topk_idx = torch.randn(tokens, EXPERTS).softmax(dim=-1).topk(TOPK)
        y = layer(*x, topk_idx, topk_weights)
        expected = plain_layer(cast_back(*x, 1), topk_idx, topk_weights, cast_back(*w13, 128), cast_back(*w2, 128))
        assert tokens == 0 or difference(y, expected) < 2e-3, difference(y, expected)
        sent += torch.bincount(topk_idx.flatten(), minlength=EXPERTS).to(torch.int)
    dist.all_reduce(sent, group=group)
    local = EXPERTS // group.size()
    assert torch.equal(layer.stats, sent[group.rank() * local :][:local]), (layer.stats, sent)
    layer.buffer.destroy()


def main():
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    torch.set_default_device("cuda")
    dist.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    group = dist.new_group(list(range(ranks)))
    run(group)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write(f"rank {rank} of {ranks}: right\n")


if __name__ == "__main__":
    sys.exit(main())
