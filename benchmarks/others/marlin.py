"""vLLM's Marlin kernel for MXFP4 weights and bf16 activations, called as its `fused_marlin_moe` calls it.

Weights are dequantised to bf16 in registers and multiplied by `mma.sync`. Needs `vllm_ops`; written for vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.others.vllm_ops import aligned, ops
from megamoe_jit._check.scenarios import Inputs, Weights
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec import MoEShape

E2M1 = 562949953487106  #: what vLLM calls `scalar_types.float4_e2m1f.id`
TILE = 16
BLOCKS = (8, 16, 32, 48, 64)  #: rows of a block that there are kernels for
FULL = 0.9  #: a block is taken that is at most so full on average
LOCKS_PER_SM = 4
CHOSEN = (-1, -1, -1)  #: tiles and blocks per SM, by its own heuristics


def _order() -> torch.Tensor:
    """Where the codes of four 16 x 16 tiles side by side come from, int64 ``[1024]``: words of 8, lanes of 4 words."""
    order = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        mine = [TILE * (row + down) + column + right for right in (0, 8) for down in (0, 1, 8, 9)]
        for tile in range(4):
            order += [TILE * TILE * tile + mine[at] for at in (0, 2, 4, 6, 1, 3, 5, 7)]
    return torch.tensor(order)


def repacked(codes: torch.Tensor) -> torch.Tensor:
    """An expert's matrix uint8 ``[N, K / 2]``, low nibble first, as Marlin reads it: int32 ``[K / 16, 2N]``."""
    rows, depth = codes.shape[0], 2 * codes.shape[1]
    by_k = torch.stack((codes & 15, codes >> 4), dim=-1).view(rows, depth).t().to(torch.int32)
    tiles = by_k.reshape(depth // TILE, TILE, rows // TILE, TILE).permute(0, 2, 1, 3).reshape(-1, 4 * TILE * TILE)
    nibbles = tiles[:, _order().to(codes.device)].view(depth // TILE, -1, 8)
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32, device=codes.device)
    for place in range(8):
        words |= nibbles[..., place] << 4 * place
    return words


def scales(e8m0: torch.Tensor) -> torch.Tensor:
    """An expert's exponents uint8 ``[N, K / 32]`` as Marlin reads them: float8_e8m0fnu ``[K / 32, N]``."""
    order = torch.tensor([8 * (at % 8) + at // 8 for at in range(64)], device=e8m0.device)
    by_lane = e8m0.t().reshape(-1, 64)[:, order].view(-1, 4)[:, [0, 2, 1, 3]]
    return by_lane.reshape(e8m0.shape[1], e8m0.shape[0]).contiguous().view(torch.float8_e8m0fnu)


def _prepared(weights: WeightTensors) -> tuple[torch.Tensor, torch.Tensor]:
    codes, exponents = weights
    return torch.stack([repacked(each) for each in codes]), torch.stack([scales(each) for each in exponents])


class Marlin:
    """The layer by Marlin's two products."""

    name = "vLLM Marlin, bf16 activations"
    exact_activations = True

    def __init__(self, weights: Weights, shape: MoEShape, clamp: float, tokens: Sequence[int]) -> None:
        ops()  # first of all, whether it is there
        self.shape, self.clamp = shape, clamp
        self.w13, self.w2 = _prepared(weights.l1), _prepared(weights.l2)
        device = weights.l1[0].device
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.locks = torch.zeros(sms * LOCKS_PER_SM, dtype=torch.int32, device=device)

    def build(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """The layer for fixed inputs; each call returns bfloat16 ``[T, H]``."""
        from benchmarks.others.between import swiglu_into, weighted_sum_into  # needs Triton

        shape, library = self.shape, ops()
        tokens, topk = inputs.topk_idx.shape
        idx, weights, slots = inputs.topk_idx.to(torch.int32), inputs.topk_weights, tokens * topk
        mean = slots / shape.experts
        block = next((each for each in BLOCKS if mean / each < FULL), BLOCKS[-1])
        made: dict[str, Any] = {"dtype": torch.bfloat16, "device": idx.device}
        gated = torch.empty(slots, 2 * shape.intermediate, **made)
        hidden = torch.empty(slots, shape.intermediate, **made)
        parts, y = torch.empty(slots, shape.hidden, **made), torch.empty(tokens, shape.hidden, **made)

        where: tuple[torch.Tensor, ...] = ()

        def product(x: torch.Tensor, w: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, *, first: bool) -> None:
            routed = *where, weights, block, topk if first else 1, not first  # weighted by the second product
            sizes = x.shape[0], out.shape[1], x.shape[1]
            library.moe_wna16_marlin_gemm(
                x,
                out,
                w[0],
                None,
                w[1],
                None,
                None,
                None,
                self.locks,
                *routed,
                E2M1,
                *sizes,
                False,
                True,
                False,
                *CHOSEN,
            )

        def call() -> torch.Tensor:
            nonlocal where
            where = aligned(idx, shape.experts, block)
            product(inputs.x, self.w13, gated, first=True)
            swiglu_into(hidden, gated, self.clamp)
            product(hidden, self.w2, parts, first=False)
            return weighted_sum_into(y, parts, None)

        return call
