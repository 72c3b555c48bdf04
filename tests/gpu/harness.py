"""One layer on the GPU through the public interface, for tests that call it more than once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import megamoe_jit as mm
from megamoe_jit._check.scenarios import Inputs, Scenario, Weights, make_inputs, make_weights
from megamoe_jit._check.verify import Verdict, function_of, judge
from megamoe_jit._spec import FP8, MoEShape, Variant, WeightFormat
from megamoe_jit.reference import moe_reference

CLAMP = 10.0
VARIANTS = tuple(variant.value for variant in Variant.reading(FP8))


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same bytes: NaN equals NaN, and zeros keep their sign."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def poisoned(tokens: int, hidden: int, device: torch.device) -> torch.Tensor:
    """Output bfloat16 ``[tokens, hidden]`` full of NaN."""
    return torch.full((tokens, hidden), math.nan, dtype=torch.bfloat16, device=device)


class Layer:
    """Weights of one shape, as drawn and as the kernel reads them."""

    def __init__(self, shape: MoEShape, device: torch.device, seed: int = 0, weights: WeightFormat = FP8) -> None:
        self.shape = shape
        self.device = device
        self.weights: Weights = make_weights(shape, device, seed, weights)
        self.l1, self.l2 = mm.transform_weights_for_mega_moe_sm90(self.weights.l1, self.weights.l2)

    def inputs(self, tokens: int, seed: int = 0, **more: Any) -> Inputs:
        """Fresh inputs; `more` goes to the scenario (route, data, masked_ratio)."""
        scenario = Scenario(f"layer.t{tokens}", self.shape, tokens, max(tokens, 1), **more)
        return make_inputs(scenario, self.device, seed, self.weights)

    @contextmanager
    def buffer(self, capacity: int, **more: Any) -> Iterator[Any]:
        """A buffer for `capacity` tokens, destroyed at the end; `more` goes to the call that makes it."""
        s = self.shape
        sizes = (s.experts, capacity, s.topk, s.hidden, s.intermediate, s.shared)
        buffer = mm.get_symm_buffer_for_mega_moe(None, *sizes, device=self.device, **more)
        try:
            yield buffer
        finally:
            torch.cuda.synchronize()
            buffer.destroy()

    def call(
        self,
        buffer: Any,
        inputs: Inputs,
        variant: str = "auto",
        stats: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Stage and call; output bfloat16 ``[T, H]``."""
        inputs.stage(buffer)
        if y is None:
            y = poisoned(inputs.x_q.shape[0], self.shape.hidden, self.device)
        more.setdefault("activation_clamp", CLAMP)
        function_of(mm, variant)(y, self.l1, self.l2, buffer, stats, **more)
        return y

    def judge(self, y: torch.Tensor, inputs: Inputs, clamp: float | None = CLAMP) -> Verdict:
        """Compare with the reference."""
        i = inputs
        expected = moe_reference(i.x_q, i.x_sf, *i.slots, *(self.weights.l1, self.weights.l2), activation_clamp=clamp)
        return judge(y, expected)
