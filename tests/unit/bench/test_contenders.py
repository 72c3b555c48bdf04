"""FlashInfer as a contender, by a stand-in that does what its documentation says."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from megamoe_jit import quantize_activations
from megamoe_jit._bench import unfused_run as _baseline_run
from megamoe_jit._bench.contenders import FlashInfer
from megamoe_jit._bench.unfused import Task
from megamoe_jit._check.scenarios import Scenario, make_inputs, make_weights
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, moe_reference

CPU, SHAPE = torch.device("cpu"), MoEShape(256, 384, 4, 2)


class StandIn:
    """Up rows before gate rows, bfloat16 in, a limit per expert; says what it was asked for."""

    def __init__(self) -> None:
        self.tuning = False
        self.tuned: list[bool] = []  #: whether each call came while it was tuning
        self.error = 1.0

    @contextlib.contextmanager
    def autotune(self, wanted: bool) -> Iterator[None]:
        self.tuning = wanted
        yield
        self.tuning = False

    def cutlass_fused_moe(
        self,
        *,
        input: torch.Tensor,
        token_selected_experts: torch.Tensor,
        token_final_scales: torch.Tensor,
        fc1_expert_weights: torch.Tensor,
        fc2_expert_weights: torch.Tensor,
        quant_scales: list[torch.Tensor],
        output_dtype: torch.dtype,
        output: torch.Tensor,
        use_deepseek_fp8_block_scale: bool,
        swiglu_alpha: torch.Tensor | None = None,
        swiglu_beta: torch.Tensor | None = None,
        swiglu_limit: torch.Tensor | None = None,
    ) -> None:
        assert (input.dtype, output_dtype) == (torch.bfloat16, torch.bfloat16)
        assert token_selected_experts.dtype == torch.int32
        assert use_deepseek_fp8_block_scale
        self.tuned.append(self.tuning)
        clamp = None
        if swiglu_limit is not None:
            experts = fc2_expert_weights.shape[0]
            assert torch.equal(swiglu_alpha, torch.ones(experts))
            assert torch.equal(swiglu_beta, torch.zeros(experts))
            assert swiglu_limit.shape == (experts,)
            clamp = float(swiglu_limit[0])
        swapped = []
        for part in (fc1_expert_weights, quant_scales[0]):
            half = part.shape[1] // 2
            swapped.append(torch.cat((part[:, half:].float(), part[:, :half].float()), dim=1))
        output.copy_(
            self.error
            * moe_reference(
                *quantize_activations(input),
                token_selected_experts.long(),
                token_final_scales,
                (swapped[0].to(fc1_expert_weights.dtype), swapped[1]),
                (fc2_expert_weights, quant_scales[1]),
                activation_clamp=clamp,
            )
        )


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    library, part, stand_in = ModuleType("flashinfer"), ModuleType("flashinfer.fused_moe"), StandIn()
    vars(library)["autotune"] = stand_in.autotune
    vars(part)["cutlass_fused_moe"] = stand_in.cutlass_fused_moe
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", part)
    return stand_in


def test_it_is_taken_only_if_it_is_there_and_right(flashinfer, monkeypatch):
    assert FlashInfer().why_not(CPU, 1) == ""
    assert "between ranks" in FlashInfer().why_not(CPU, 2)
    flashinfer.error = 1.1
    assert "wrong results (calc_diff 0.00" in FlashInfer().why_not(CPU, 1)
    monkeypatch.delattr(sys.modules["flashinfer.fused_moe"], "cutlass_fused_moe")
    assert "AttributeError" in FlashInfer().why_not(CPU, 1)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert FlashInfer().why_not(CPU, 1) == "flashinfer is not installed"


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_it_gives_the_layer_and_tunes_itself_before(flashinfer, clamp):
    weights = make_weights(SHAPE, "cpu")
    inputs = make_inputs(Scenario("b", SHAPE, 9, 9), "cpu", 0, weights)
    call = FlashInfer().build(Task(inputs, weights, SHAPE.experts, clamp), compiled=False)
    assert flashinfer.tuned == [True]
    expected = moe_reference(*inputs.operands, activation_clamp=clamp)
    assert calc_diff(call(), expected) < FlashInfer.bound
    assert flashinfer.tuned == [True, False]


def test_it_is_timed_without_torch_compile(flashinfer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    weights = make_weights(SHAPE, "cpu")
    inputs = make_inputs(Scenario("b", SHAPE, 9, 9), "cpu", 0, weights)
    task = Task(inputs, weights, SHAPE.experts, 10.0)
    call, facts = _baseline_run.prepare(FlashInfer(), task, lambda y: float(y.isnan().any()))
    assert facts == {"graph": False, "compiled": False, "reason": "", "diff": 0.0}
    before = len(flashinfer.tuned)
    call.run()
    assert len(flashinfer.tuned) == before + 1
