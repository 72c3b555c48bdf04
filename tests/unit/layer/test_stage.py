"""Staging on the host: which launches a batch needs, what they are told, and what is refused before any of them.

The kernels' part is done by torch, on what it finds at the addresses that it is given; the numbers of the kernels
themselves are the subject of `tests/unit/kernels/test_stage_numbers.py`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._device.params import StageParams
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._settings.settings import override
from megamoe_jit._spec.any_layer import StageFormat
from megamoe_jit._spec.inputs import Inputs
from tests.unit.layer.test_calls import HERE, L1, L2, SHAPE, STATS, Cuda, buffer, call, cuda, refused  # noqa: F401
from tests.unit.layer.test_moe import F32, FP8, IDS, WEIGHTS, at, compute, expected, inputs, layer, rows, same

NUMBERS = {StageFormat.BF16: torch.bfloat16, StageFormat.F16: torch.float16, StageFormat.F32: F32}


def stage(params: StageParams, form: StageFormat) -> None:
    """What the staging kernel does."""
    tokens, hidden, topk = params.tokens, params.hidden, params.topk
    out_x, out_scales = at(params.out_x, FP8, tokens, hidden), at(params.out_scales, F32, tokens, hidden // 128)
    if tokens and form is StageFormat.E4M3:
        out_x.copy_(rows(params.x, FP8, tokens, hidden, params.x_stride))
        for row in range(tokens):
            for column in range(hidden // 128):
                out_scales[row, column] = scale_of(params, row, column)
    elif tokens:
        x = rows(params.x, NUMBERS[form], tokens, hidden, params.x_stride // NUMBERS[form].itemsize)
        for out, values in zip((out_x, out_scales), mm.quantize_activations(x), strict=True):
            out.copy_(values)
    ids, weights = (
        at(params.out_ids, torch.int64, params.masked, topk),
        at(params.out_weights, F32, params.masked, topk),
    )
    ids.fill_(-1), weights.fill_(0)
    if tokens:
        ids[:tokens] = rows(params.ids, IDS[params.formats & 1], tokens, topk, params.ids_stride)
        given = rows(params.weights, WEIGHTS[params.formats & 6], tokens, topk, params.weights_stride)
        weights[:tokens] = given.float() * params.weight_factor


def scale_of(params: StageParams, row: int, column: int) -> float:
    packed = 4 if params.formats & 16 else 1
    address = params.x_scales + row * params.scales_row + column // packed * params.scales_column + column % packed
    return at(address, torch.float8_e8m0fnu if params.formats & 8 else F32, 1).float().item()


@pytest.fixture
def it(cuda: Cuda, buffer: SymmBuffer) -> SymmBuffer:  # noqa: F811
    """The buffer, with kernels that do what they are told."""
    cuda.stage, cuda.kernel = stage, compute
    return buffer


def spread(tensor: torch.Tensor, gap: int, start: int = 0) -> torch.Tensor:
    """The same numbers in rows that lie further apart."""
    wide = torch.zeros(tensor.shape[0], tensor.shape[1] + gap, dtype=tensor.dtype)
    wide.view(torch.uint8).fill_(0x5A)
    wide[:, start : start + tensor.shape[1]] = tensor
    return wide[:, start : start + tensor.shape[1]]


def run(buffer: SymmBuffer, *batch: torch.Tensor, **more: object) -> torch.Tensor:  # noqa: F811
    return mega_moe_from_bf16(*batch, L1, L2, buffer, **more)


@pytest.mark.parametrize("gap", [0, 8, 24])
@pytest.mark.parametrize("ids", IDS.values())
@pytest.mark.parametrize("weights", WEIGHTS.values())
def test_bf16_rows_at_multiples_of_16_bytes_are_staged_in_the_launch(
    cuda: Cuda,  # noqa: F811
    it: SymmBuffer,
    gap: int,
    ids: torch.dtype,
    weights: torch.dtype,
):
    x, i, w = inputs(20)
    i, w = i.to(ids), w.to(weights)
    y = run(it, spread(x, gap), spread(i, gap), spread(w, gap), routed_scaling_factor=2.5)
    assert torch.equal(y, expected(x, i.long(), w.float() * 2.5, None))
    assert (len(cuda.stages), [each.spec.inputs for each in cuda.launches]) == (0, [Inputs.RAW])


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda x: spread(x, 4), StageFormat.BF16),
        (lambda x: spread(x, 8, 1), StageFormat.BF16),
        (lambda x: spread(x.half(), 3, 2), StageFormat.F16),
        (lambda x: spread(x.float(), 3, 2), StageFormat.F32),
        (lambda x: transposed(x.float()), StageFormat.F32),
        (lambda x: torch._neg_view(-x.float()), StageFormat.F32),
    ],
)
def test_all_other_rows_are_staged_by_a_launch_before(cuda: Cuda, it: SymmBuffer, change: Callable, form: StageFormat):  # noqa: F811
    x, ids, weights = inputs(20)
    y = run(it, change(x), ids.int(), weights, activation_clamp=0.02)
    assert torch.equal(y, expected(x, ids, weights, 0.02))
    assert [each.spec.kind for each in cuda.stages] == [form]
    assert [each.spec.inputs for each in cuda.launches] == [Inputs.STAGED]
    assert [event[0] for event in cuda.events if event[0] != "use"] == ["stage", "launch"]


def test_transposed_bf16_ids_and_weights_are_copied_first(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    x, ids, weights = inputs(20)
    y = run(it, transposed(x), transposed(ids), transposed(weights))
    assert torch.equal(y, expected(x, ids, weights, None))
    assert [each.spec.inputs for each in cuda.launches] == [Inputs.RAW]


def test_no_tokens_at_all(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    cuda.kernel = lambda params: None
    for dtype in (torch.bfloat16, torch.float32):
        batch = inputs(0)
        assert run(it, batch[0].to(dtype), *batch[1:]).shape == (0, 256)
    assert [each.params.tokens for each in (*cuda.stages, *cuda.launches)] == [0, 0, 0]


def test_a_fused_call_takes_all_that_a_staged_one_does(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    options = {"activation_clamp": 2.5, "num_sms": 60, "variant": "cooperative", "fast_math": False}
    made = run(it, *inputs(3), y=y, cumulative_local_expert_recv_stats=STATS, **options)
    spec, grid, params = cuda.launches[0]
    assert made is y
    assert (params.y, params.stats, params.clamp, grid) == (y.data_ptr(), STATS.data_ptr(), 2.5, 60)
    assert (spec.variant.value, spec.fast_math, spec.inputs) == ("cooperative", False, Inputs.RAW)
    refused(lambda: run(it, *inputs(3), y=y[:2]), "y has shape (2, 256); allowed: (3, 256)")
    refused(lambda: run(it, *inputs(3), cumulative_local_expert_recv_stats=STATS[:3]), "recv_stats has shape (3,)")
    refused(lambda: run(it, *inputs(3), activation_clamp=-1.0), "activation_clamp = -1.0 is not supported")
    refused(lambda: run(it, *inputs(129)), "x has 129 tokens; allowed: at most 128, the layer's max_tokens")
    refused(lambda: mega_moe_from_bf16(*inputs(3), L1, L2, None), "sym_buffer: NoneType given")
    refused(lambda: mega_moe_from_bf16(*inputs(3), L2, L1, it), "l1 weights has shape")
    refused(lambda: mega_moe_from_bf16(*inputs(3), None, L2, it), "l1: NoneType given")
    assert len(cuda.launches) == 1


def test_debug_mode_looks_at_the_ids_of_the_caller(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    x, ids, weights = inputs(3)
    ids[1, 1] = 4
    with override(debug=True):
        refused(lambda: run(it, x, ids, weights), "topk_idx[1, 1] = 4 is not an expert")
        refused(lambda: run(it, x.float(), ids, weights), "topk_idx[1, 1] = 4 is not an expert")
    assert (cuda.stages, cuda.launches) == ([], [])


def staged(buffer: SymmBuffer, tokens: int) -> list[torch.Tensor]:  # noqa: F811
    return [view[:tokens].clone() for view in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]


def test_a_staged_batch_is_what_the_call_finds(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    x, ids, weights = inputs(5)
    assert mm.stage(it, x, ids.int(), weights.half(), routed_scaling_factor=2, padded_tokens=9) == 9
    codes, scales = mm.quantize_activations(x)
    padding = torch.full((4, 2), -1), torch.zeros(4, 2)
    found = staged(it, 9)
    assert all(same(a, b) for a, b in zip(found, (codes, scales), strict=False) for a in [a[:5]])
    assert torch.equal(found[2], torch.cat([ids, padding[0]]))
    assert torch.equal(found[3], torch.cat([weights.half().float() * 2, padding[1]]))
    assert (it.x[5:].view(torch.uint8) == 0xA5).all()
    assert (it.topk_idx[9:].view(torch.uint8) == 0xA5).all()
    assert torch.equal(call(it, 9)[:5], expected(x, ids, weights.half().float() * 2, None))
    assert mm.stage(it, x, ids, weights) == 5


@pytest.mark.parametrize(
    ("factor", "padded", "says"),
    [
        (None, None, "routed_scaling_factor = None is not supported"),
        (True, None, "routed_scaling_factor = True is not supported"),
        (math.nan, None, "routed_scaling_factor = nan is not supported"),
        (1e39, None, "routed_scaling_factor = 1e+39 is not supported; allowed: a number that float32 holds"),
        (10**400, None, "routed_scaling_factor = an integer of 1329 bits"),
        (1.0, 4, "padded_tokens = 4 is not supported; allowed: 5 to 128"),
        (1.0, 129, "padded_tokens = 129 is not supported; allowed: 5 to 128"),
        (1.0, 8.0, "padded_tokens = 8.0 is not supported"),
    ],
)
def test_what_staging_refuses(cuda: Cuda, it: SymmBuffer, factor: object, padded: object, says: str):  # noqa: F811
    batch = inputs(5)
    refused(lambda: mm.stage(it, *batch, routed_scaling_factor=factor, padded_tokens=padded), says)
    refused(lambda: mm.stage(None, *batch), "sym_buffer: NoneType given; allowed: a SymmBuffer")
    assert cuda.stages == []


@pytest.mark.parametrize("name", ["row", "column", "gaps", "exponents", "packed", "packed columns"])
def test_codes_come_with_scales_of_any_layout(cuda: Cuda, name: str):  # noqa: F811
    cuda.stage = stage
    shape = mm.MoEShape(512, 128, 4, 2)
    it = SymmBuffer(shape, 128, HERE)
    codes, scales = mm.quantize_activations(torch.randn(6, 512))
    exponents = torch.randint(0, 256, (6, 4), dtype=torch.uint8)
    floats = exponents.view(torch.float8_e8m0fnu).float()
    given, wanted = {
        "row": (scales, scales),
        "column": (transposed(scales), scales),
        "gaps": (spread(scales, 3, 1), scales),
        "exponents": (exponents.view(torch.float8_e8m0fnu), floats),
        "packed": (exponents.view(torch.int32), floats),
        "packed columns": (transposed(exponents.view(torch.int32)), floats),
    }[name]
    ids, weights = torch.zeros(6, 2, dtype=torch.int32), torch.ones(6, 2)
    for x in (codes, spread(codes.view(torch.uint8), 8, 4).view(FP8), transposed(codes.view(torch.uint8)).view(FP8)):
        mm.stage(it, x, ids, weights, x_scales=given)
        assert same(it.x[:6], codes)
        assert torch.equal(torch.nan_to_num(it.x_sf[:6]), torch.nan_to_num(wanted))
    assert {each.spec.kind for each in cuda.stages} == {StageFormat.E4M3}


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        (None, "x is float8_e4m3fn without x_scales"),
        (1.0, "x_scales: float given"),
        (torch.ones(3, 2).double(), "x_scales has dtype torch.float64; allowed: float32, float8_e8m0fnu, int32"),
        (torch.ones(2, 2), "x_scales has shape (2, 2); allowed: (3, 2)"),
        (torch.ones(3, 2, device="meta"), "x_scales is on meta; allowed: cpu"),
        (torch.ones(3, 1, dtype=torch.int32), "packed in int32 with hidden = 256; allowed: a multiple of 512"),
    ],
)
def test_scales_that_do_not_fit(cuda: Cuda, it: SymmBuffer, scales: object, says: str):  # noqa: F811
    x, ids, weights = inputs(3)
    refused(lambda: mm.stage(it, x.to(FP8), ids, weights, x_scales=scales), says)
    if isinstance(scales, torch.Tensor):
        refused(lambda: mm.stage(it, x, ids, weights, x_scales=scales), "x is torch.bfloat16 with x_scales")
    assert cuda.stages == []


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU."""
    from megamoe_jit._layer import stage as _stage

    monkeypatch.setattr(_stage, "require_gpu", lambda name, device: None)


def views(it: SymmBuffer) -> tuple[torch.Tensor, ...]:
    return it.x, it.x_sf, it.topk_idx, it.topk_weights


def test_upstreams_name_for_it_masks_all_rows_that_are_left(cuda: Cuda, it: SymmBuffer, on_gpu: None):  # noqa: F811
    x, ids, weights = inputs(7)
    mm.mega_moe_pre_dispatch_sm90(
        x, ids.int(), weights, *views(it), num_tokens=5, group_size=128, routed_scaling_factor=2.5
    )
    assert same(it.x[:5], mm.quantize_activations(x[:5])[0])
    assert torch.equal(it.topk_idx[:5], ids[:5])
    assert torch.equal(it.topk_weights[:5], weights[:5] * 2.5)
    assert (it.topk_idx[5:] == -1).all()
    assert torch.equal(call(it, 6), torch.cat([expected(x[:5], ids[:5], weights[:5] * 2.5, None), torch.zeros(1, 256)]))
    mm.mega_moe_pre_dispatch_sm90(x[:0], ids[:0], weights[:0], *views(it), 0)
    assert torch.equal(call(it, 1), torch.zeros(1, 256).bfloat16()), "y has a row where there is no token"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"group_size": 64}, "group_size = 64 is not supported; allowed: 128"),
        ({"num_tokens": 129}, "num_tokens = 129 is not supported; allowed: 0 to 128"),
        ({"num_tokens": 4}, "x has shape (3, 256); allowed: 4 rows or more"),
        ({"num_tokens": None}, "num_tokens = None"),
        ({"x": 1.0}, "x: float given"),
        ({"topk_idx": torch.zeros(3, 3).long()}, "topk_idx has shape (3, 3); allowed: (3, 2)"),
        ({"buf_x": None}, "buf_x: NoneType given"),
        ({"buf_x": torch.zeros(3)}, "buf_x has shape (3,); allowed: two dimensions"),
        ({"buf_x": torch.zeros(3, 100)}, "buf_x has 100 columns; allowed: a multiple of 128"),
        ({"buf_x": torch.zeros(3, 256)}, "buf_x has dtype torch.float32; allowed: torch.float8_e4m3fn"),
        ({"buf_x_sf": torch.zeros(3, 2)}, "buf_x_sf has shape (3, 2); allowed: (128, 2)"),
        ({"buf_topk_idx": torch.zeros(128, 2).int()}, "buf_topk_idx has dtype torch.int32; allowed: torch.int64"),
        ({"buf_topk_weights": torch.zeros(128, 4)[:, ::2]}, "buf_topk_weights has strides (4, 2)"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor = '2' is not supported"),
    ],
)
def test_what_upstreams_name_refuses(cuda: Cuda, it: SymmBuffer, on_gpu: None, wrong: dict, says: str):  # noqa: F811
    names = ("x", "topk_idx", "topk_weights", "buf_x", "buf_x_sf", "buf_topk_idx", "buf_topk_weights")
    right = dict(zip(names, (*inputs(3), *views(it)), strict=True)) | {"num_tokens": 3}
    refused(lambda: mm.mega_moe_pre_dispatch_sm90(**{**right, **wrong}), says)
    assert cuda.stages == []
    mm.mega_moe_pre_dispatch_sm90(**right)


def test_buffers_of_upstreams_name_are_on_a_gpu(it: SymmBuffer):
    refused(lambda: mm.mega_moe_pre_dispatch_sm90(*inputs(3), *views(it), 3), "buf_x is on cpu; allowed: a CUDA device")


def python_calls(action: Callable[[], object]) -> list[str]:
    """Names of the Python functions that an action calls."""
    seen: list[str] = []

    def note(frame: object, event: str, _: object) -> None:
        if event == "call":
            seen.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}")  # type: ignore[attr-defined]

    gc.disable()  # others hang on to it
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen[1:]


STAND_INS = ("test_", "<string>")  #: files of what stands for torch and the driver


def test_steady_calls_take_few_functions(cuda: Cuda, buffer: SymmBuffer):  # noqa: F811
    """A module's five more are torch's own two, two that ask whether somebody traces, and `forward`."""
    y, made, batch = torch.empty(3, 256, dtype=torch.bfloat16), layer(), inputs(3)
    slow = (batch[0].float(), *batch[1:])
    for most, steady in (
        (13, lambda: mm.fp8_mega_moe(y, L1, L2, buffer)),
        (17, lambda: made(*batch)),
        (21, lambda: run(buffer, *slow)),  # two launches
    ):
        steady()
        calls = [name for name in python_calls(steady) if not name.startswith(STAND_INS)]
        assert len(calls) <= most, calls


def test_weights_of_layers_that_share_a_buffer_are_checked_once(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    other = mm.transform_weights_for_mega_moe_sm90(
        *((codes.clone(), scales) for codes, scales in mm.inverse_transform_weights_for_mega_moe_sm90(L1, L2))
    )
    batch = inputs(3)

    def both() -> None:
        run(it, *batch)
        mega_moe_from_bf16(*batch, *other, it)

    both()
    assert not [name for name in python_calls(both) if "check_weights" in name]
    assert [each.params.weight1 for each in cuda.launches] == [L1[0].data_ptr(), other[0][0].data_ptr()] * 2


def test_a_batch_keeps_the_copies_it_made(cuda: Cuda, it: SymmBuffer):  # noqa: F811
    x, ids, weights = inputs(3)
    raw = RawInputs(transposed(x), ids, weights, 256, 2, HERE)
    assert same(rows(raw.x_at, torch.bfloat16, 3, 256, raw.x_stride // 2), x)
    assert ctypes.sizeof(StageParams) == 128
