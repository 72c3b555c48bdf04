"""What the fused kernel is timed beside: the same layer in several launches, by what is installed here.

`METHODS` lists them all, the last resort last.  Each says for itself why it cannot be used, after it has compared a
small result with what it should be, so a library that has changed is named and left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

from megamoe_jit._bench.grouped_gemm import GEMMS, Gemm, probe, refusal
from megamoe_jit._bench.unfused import Baseline, Task
from megamoe_jit._check.scenarios import Scenario, make_inputs, make_weights
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, moe_reference


class Contender(Protocol):
    """Another way to do the layer.

    Attributes:
        name: what it is called in tables.
        bound: `calc_diff` to the FP32 reference that its numerics allow.
        compiles: whether torch.compile has a part in it.
    """

    name: str
    bound: float
    compiles: bool

    def why_not(self, device: torch.device, ranks: int) -> str:
        """Why it does not work here; empty if it does, and gives what it should."""

    def build(self, task: Task, compiled: bool) -> Callable[[], torch.Tensor]:
        """The layer, with a part of torch.compile or not; each call returns the output bfloat16 ``[T, H]``."""


class Unfused:
    """The layer of public parts (`Baseline`), around one way to multiply."""

    compiles = True

    def __init__(self, gemm: type[Gemm]) -> None:
        self.gemm, self.name, self.bound = gemm, gemm.name, gemm.bound

    def why_not(self, device: torch.device, ranks: int) -> str:
        """See `Contender`; the multiplication alone is tried."""
        return probe(self.gemm, device)

    def build(self, task: Task, compiled: bool) -> Callable[[], torch.Tensor]:
        """See `Contender`."""
        return Baseline(self.gemm, task, compiled)


class FlashInfer:
    """FlashInfer's layer for Hopper, tuned by its own tuner before it is timed; only if it is installed.

    It takes bfloat16 and quantises inside the call, where the others are given codes and scales.  It wants up rows
    before gate rows; the clamp is what it calls a limit, with alpha 1 and beta 0.
    Source: https://docs.flashinfer.ai/generated/flashinfer.fused_moe.cutlass_fused_moe.html
    """

    name = "FlashInfer cutlass_fused_moe, block scales"
    bound = 1e-3
    compiles = False

    def why_not(self, device: torch.device, ranks: int) -> str:
        """See `Contender`; a small layer is tried."""
        if ranks > 1:
            return "it does not exchange rows between ranks"
        shape, clamp = MoEShape(512, 256, 8, 2), 10.0
        weights = make_weights(shape, device)
        inputs = make_inputs(Scenario("probe", shape, 32, 32), device, 0, weights)
        try:
            got = self.build(Task(inputs, weights, shape.experts, clamp), compiled=False)()
        except Exception as error:  # of FlashInfer, of the compiler it calls: anything
            return refusal(error)
        diff = calc_diff(got, moe_reference(*inputs.operands, activation_clamp=clamp))
        return "" if diff <= self.bound else f"wrong results (calc_diff {diff:.2g})"

    def build(self, task: Task, compiled: bool) -> Callable[[], torch.Tensor]:
        """See `Contender`."""
        library: Any = importlib.import_module("flashinfer")
        layer: Any = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
        inputs, own = task.inputs, task.own
        y = torch.empty_like(inputs.x)
        arguments: dict[str, Any] = {
            "input": inputs.x,
            "token_selected_experts": inputs.topk_idx.to(torch.int32),
            "token_final_scales": inputs.topk_weights,
            "fc1_expert_weights": _up_first(own.l1[0]),
            "fc2_expert_weights": own.l2[0],
            "quant_scales": [_up_first(own.l1[1]), own.l2[1]],
            "output_dtype": y.dtype,
            "output": y,
            "use_deepseek_fp8_block_scale": True,
        }
        if task.clamp is not None:
            for name, value in (("alpha", 1.0), ("beta", 0.0), ("limit", task.clamp)):
                arguments[f"swiglu_{name}"] = torch.full((task.experts,), value, dtype=torch.float32, device=y.device)

        def call() -> torch.Tensor:
            layer(**arguments)
            return y

        with library.autotune(True):
            call()
        return call


def _up_first(l1: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up, or of their scales, the other way round."""
    gate, up = l1.view(torch.uint8).chunk(2, dim=1)
    return torch.cat((up, gate), dim=1).view(l1.dtype)


METHODS: tuple[Contender, ...] = (FlashInfer(), *(Unfused(gemm) for gemm in GEMMS))
