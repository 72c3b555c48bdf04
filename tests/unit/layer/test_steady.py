"""Calls like an earlier one: what they need not check again, and what they do, however often others were right."""

from __future__ import annotations

import math

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer import steady as _steady
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import Variant
from tests.unit.layer.test_calls import L1, L2, STATS, Cuda, buffer, call, cuda, refused  # noqa: F401
from tests.unit.layer.test_stage import python_calls

CLAMP = 2.5


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"fast_math": True}, {"fast_math": 1}),
        ({"activation_clamp": 1.0}, {"activation_clamp": True}),
        ({"num_sms": 60}, {"num_sms": 60.0}),
        ({"recipe": (128, 128, 128)}, {"recipe": (128.0, 128, 128)}),
        ({"activation": "swiglu"}, {"activation": "swiglu "}),
        ({"shared_weight": 1.0}, {"shared_weight": True}),
        ({"variant": "pingpong"}, {"variant": "ping"}),
        ({"num_tokens_bound": 5}, {"num_tokens_bound": 2}),
        ({"cumulative_local_expert_recv_stats": STATS}, {"cumulative_local_expert_recv_stats": STATS[:3]}),
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_equals_a_right_option_is_refused_after_it_as_before(
    cuda: Cuda,  # noqa: F811
    buffer: SymmBuffer,  # noqa: F811
    right: dict,
    wrong: dict,
):
    for _ in range(2):
        refused(lambda: call(buffer, **wrong), f"{next(iter(wrong))} ")
        call(buffer, **right)
    assert len(cuda.launches) == 2


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (torch.empty(3, 256), "y has dtype torch.float32"),
        (torch.empty(3, 128, dtype=torch.bfloat16), "y has shape (3, 128)"),
        (torch.empty(3, 256, dtype=torch.bfloat16, device="meta"), "y is on meta"),
        (torch.empty(256, 3, dtype=torch.bfloat16).t(), "y has strides"),
        (torch.empty(3 * 256 + 4, dtype=torch.bfloat16)[4:].view(3, 256), "y starts at"),
        (torch.empty(3, dtype=torch.bfloat16), "y has shape (3,)"),
        (torch.empty(129, 256, dtype=torch.bfloat16), "y has 129 rows"),
        ([[1.0]], "y: list given"),
    ],
    ids=lambda given: given.replace(" ", "-") if isinstance(given, str) else "",
)
def test_every_output_is_checked(cuda: Cuda, buffer: SymmBuffer, y: object, says: str):  # noqa: F811
    for _ in range(2):
        refused(lambda: mm.fp8_mega_moe(y, L1, L2, buffer), says)
        call(buffer)
    assert len(cuda.launches) == 2


def test_a_call_brings_its_own_options_whatever_the_last_one_had(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    def facts() -> tuple[object, ...]:
        spec, grid, params = cuda.launches[-1]
        return spec.variant, grid, params.tokens, params.clamp, spec.numerics.fast_math

    plain = Variant.PINGPONG, 132, 3, math.inf, True
    for _ in range(2):
        call(buffer)
        assert facts() == plain
        call(buffer, activation_clamp=CLAMP)
        assert facts() == (*plain[:3], CLAMP, True)
        call(buffer, fast_math=False)
        assert facts() == (*plain[:4], False)
        call(buffer, 4, num_sms=60)
        assert facts() == (plain[0], 60, 4, *plain[3:])
        call(buffer, variant="cooperative")
        assert facts() == (Variant.COOPERATIVE, *plain[1:])


def test_settings_that_change_are_followed(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    call(buffer)
    buffer.topk_idx.fill_(99)
    call(buffer)
    with override(debug=True):
        refused(lambda: call(buffer), "topk_idx[0, 0] = 99 is not an expert")
    with override(variant="cooperative"):
        call(buffer)
    assert [each.spec.variant.value for each in cuda.launches] == ["pingpong", "pingpong", "cooperative"]


def test_a_list_that_was_right_is_looked_at_again(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    recipe = [128, 128, 128]
    for _ in range(2):
        call(buffer, recipe=recipe)
    recipe[2] = 64
    refused(lambda: call(buffer, recipe=recipe), "recipe = [128, 128, 64]")
    assert len(cuda.launches) == 2


def test_a_failure_that_is_found_while_a_call_is_checked_lasts(
    cuda: Cuda,  # noqa: F811
    buffer: SymmBuffer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    note = buffer.steady.note

    def after_another_threads_check(*given: object) -> None:
        buffer.poison(mm.DeviceFaultError("gave up"))
        note(*given)

    monkeypatch.setattr(buffer.steady, "note", after_another_threads_check)
    for _ in range(2):
        with pytest.raises(mm.DeviceFaultError, match="unusable since an earlier call failed: gave up"):
            call(buffer)
    assert not cuda.launches


def test_token_counts_that_are_remembered_have_a_limit(
    cuda: Cuda,  # noqa: F811
    buffer: SymmBuffer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(_steady, "MOST", 4)
    for tokens in range(12):
        for _ in range(2):
            call(buffer, tokens)
        assert 0 < len(buffer.steady._known) <= 4
    assert [each.params.tokens for each in cuda.launches] == [tokens for tokens in range(12) for _ in range(2)]


def test_options_are_checked_once(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    y = torch.empty(3, 256, dtype=torch.bfloat16)

    def steady() -> None:
        mm.fp8_mega_moe(y, L1, L2, buffer, activation_clamp=CLAMP)

    first, second = python_calls(steady), python_calls(steady)
    assert "checks.py:check_clamp" in first
    assert not [name for name in second if "check" in name]
