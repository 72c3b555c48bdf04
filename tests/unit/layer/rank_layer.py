"""The package's interface over the reference, for runners of several ranks on the CPU.

The variable RANK_LAYER_FAILS says where the last rank fails for how many tokens: "3:call,8:after"; RANK_LAYER_LOG
names a file that gets a line for each buffer and each call, with the rank and a sum of the inputs.
"""

import os

import torch
import torch.distributed as dist

from megamoe_jit._check.scenarios import make_weights
from megamoe_jit._errors import ConfigError, PeerTimeoutError
from megamoe_jit._layer.group import collectively
from megamoe_jit._layer.weights import transform_weights_for_mega_moe_sm90
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import expert_counts, moe_reference

__all__ = ["fp8_mega_moe_cooperative", "fp8_mega_moe_pingpong", "transform_weights_for_mega_moe_sm90"]


class Buffer:
    """Only what a caller sees."""

    def __init__(self, shape, capacity):
        self.shape = shape
        self.x = torch.zeros(capacity, shape.hidden, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self.x_sf = torch.zeros(capacity, shape.hidden // 128)
        self.topk_idx = torch.zeros(capacity, shape.topk, dtype=torch.int64)
        self.topk_weights = torch.zeros(capacity, shape.topk)

    def check(self):
        pass

    def destroy(self):
        dist.barrier()


def note(*what):
    """Write a line to the file, if there is one."""
    if "RANK_LAYER_LOG" in os.environ:
        with open(os.environ["RANK_LAYER_LOG"], "a", encoding="utf-8") as log:
            log.write(" ".join(map(str, (dist.get_rank(), *what))) + "\n")


def fails(where, tokens):
    """Whether this rank is to fail here."""
    last = dist.get_rank() == dist.get_world_size() - 1
    return last and f"{tokens}:{where}" in os.environ.get("RANK_LAYER_FAILS", "").split(",")


def refuse():
    raise ConfigError("refused")


def get_symm_buffer_for_mega_moe(group, experts, capacity, topk, hidden, intermediate):
    assert group is dist.group.WORLD
    tokens = capacity - 5  # as in the table of the test
    note("buffer")
    collectively(group, "making a buffer", refuse if fails("buffer", tokens) else lambda: None)
    return Buffer(MoEShape(hidden, intermediate, experts, topk), capacity)


def fp8_mega_moe_pingpong(y, l1, l2, buffer, stats, *, activation_clamp, fast_math=True):
    views = [v[: y.shape[0]] for v in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]
    note("call", views[1].double().sum().item())
    weights = make_weights(buffer.shape, "cpu")
    y.copy_(moe_reference(*views, weights.l1, weights.l2, activation_clamp=activation_clamp))
    counts = expert_counts(buffer.topk_idx[: y.shape[0]], buffer.shape.experts).to(torch.int64)
    dist.all_reduce(counts)
    local = stats.shape[0]
    assert l1[0].shape[0] == l2[0].shape[0] == local
    stats += counts[dist.get_rank() * local : (dist.get_rank() + 1) * local].to(torch.int32)


def fp8_mega_moe_cooperative(y, l1, l2, buffer, stats, *, activation_clamp, fast_math=True):
    """Wrong on the last rank for one token, lost on three."""
    fp8_mega_moe_pingpong(y, l1, l2, buffer, stats, activation_clamp=activation_clamp, fast_math=fast_math)
    if dist.get_rank() == dist.get_world_size() - 1:
        if y.shape[0] == 3:
            raise PeerTimeoutError("rank 1: missing: rank 0")
        y += 1


def fp8_mega_moe(y, l1, l2, buffer, stats, *, activation_clamp, fast_math=True):
    """Right, or failing where the variable says."""
    collectively(dist.group.WORLD, "checking", refuse if fails("call", y.shape[0]) else lambda: None)
    fp8_mega_moe_pingpong(y, l1, l2, buffer, stats, activation_clamp=activation_clamp, fast_math=fast_math)
    if fails("after", y.shape[0]):
        raise ValueError("odd")
