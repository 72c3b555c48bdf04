"""Every argument of every public function against a table of hostile values: one `ConfigError`, or it is accepted.

A `ConfigError` says which argument it was. Other exceptions, and values that are taken for what they are not, fail.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer import calls as _api
from megamoe_jit._layer import stage as _stage
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.from_bf16 import mega_moe_from_bf16
from megamoe_jit._settings.settings import override
from megamoe_jit.checkpoints import convert, load_experts, load_shared_experts
from megamoe_jit.heuristics import parse_shapes, preset
from megamoe_jit.heuristics.select import choose
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference, row_diffs, swiglu, with_shared_experts
from tests.checkpoints import Model
from tests.unit.layer.test_calls import DRAWN, L1, L2, SHAPE, Cuda, buffer, cuda  # noqa: F401


class Unwritable:
    """Whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


X = torch.zeros(3, 256)
HOSTILE: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "a huge integer": 10**5000,
    "beyond float32": 1e39,
    "inf": math.inf,
    "minus inf": -math.inf,
    "nan": math.nan,
    "text": "x",
    "no text": "",
    "bytes": b"x",
    "nul": "a\0b",
    "a list": [128, 128],
    "a dict": {},
    "numpy numbers": np.array([128] * 3),
    "a numpy scalar": np.int64(3),
    "numpy floats": np.zeros((3, 256), dtype=np.float32),
    "a tensor": torch.zeros(3),
    "no tensor": torch.zeros(0),
    "a 0-d tensor": torch.tensor(3),
    "complex": torch.zeros(3, 256, dtype=torch.complex64),
    "sparse": X.to_sparse(),
    "sparse rows": X.to_sparse_csr(),
    "nested": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
    "jagged": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged),
    "meta": torch.zeros(3, 256, device="meta"),
    "quantised": torch.quantize_per_tensor(X, 1.0, 0, torch.quint8),
    "a pair": (None, None),
    "a fraction": Fraction(1, 2),
    "a text without end": "x" * 5000,
    "more than 64 bits": 2**64,
    "a type": int,
    "an object": Unwritable(),
}
IDS, ROUTER = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
CODES = mm.quantize_activations(X)
Y = torch.zeros(3, 256, dtype=torch.bfloat16)
BUFFER_SIZES = {
    "group": None,
    "num_experts": 4,
    "num_max_tokens_per_rank": 64,
    "num_topk": 2,
    "hidden": 256,
    "intermediate_hidden": 128,
    "num_shared_experts": 0,
    "use_fp8_dispatch": None,
    "mma_type": "fp8xfp4",
    "activation": "swiglu",
    "device": "cpu",
    "max_pool_rows": 4096,
}
PAIRS = {"l1_weights": DRAWN.l1, "l2_weights": DRAWN.l2}
READY = {"l1_weights": L1, "l2_weights": L2}
MXFP4 = [
    (torch.zeros(4, rows, depth // 2, dtype=torch.uint8), torch.full((4, rows, depth // 32), 127, dtype=torch.uint8))
    for rows, depth in ((256, 256), (256, 128))
]
SPEC = mm.KernelSpec(SHAPE, mm.Variant.PINGPONG)


def on_copies(function: Callable[..., Any], transformed: bool) -> Callable[..., Any]:
    """`function` on weights that nobody else has, since `inplace=True` writes them over."""

    def call(l1_weights: Any, l2_weights: Any, **more: Any) -> Any:
        pairs = [l1_weights, l2_weights]
        for i, right in enumerate((READY if transformed else PAIRS).values()):
            pairs[i] = tuple(tensor.clone() for tensor in right) if pairs[i] is right else pairs[i]
        with contextlib.suppress(mm.ConfigError):  # for hostile ones
            mm.mark_transformed(*pairs, transformed=transformed)
        return function(*pairs, **more)

    return call


FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "MoEShape": (mm.MoEShape, {"hidden": 256, "intermediate": 128, "experts": 4, "topk": 2}),
    "KernelSpec": (mm.KernelSpec, {"shape": SHAPE, "variant": mm.Variant.PINGPONG, "ranks": 1, "fast_math": True}),
    "KernelSpec.from_json": (mm.KernelSpec.from_json, {"data": SPEC.to_json()}),
    "Variant.parse": (mm.Variant.parse, {"text": "pingpong"}),
    "enumerate_specs": (mm.enumerate_specs, {"shape": SHAPE, "ranks": 1, "variants": None, "fast_math": True}),
    "warmup": (mm.warmup, {"specs": [], "jobs": 1, "force": False, "progress": None}),
    "preset": (preset, {"name": "v4-flash"}),
    "parse_shapes": (parse_shapes, {"text": "v4-flash"}),
    "choose": (
        choose,
        {
            "shape": SHAPE,
            "tokens": 3,
            "ranks": 1,
            "variant": "auto",
            "cooperative_threshold": None,
            "num_sms": 132,
            "gpu": None,
        },
    ),
    "quantize_weights": (mm.quantize_weights, {"w": torch.zeros(128, 128)}),
    "quantize_activations": (mm.quantize_activations, {"x": X}),
    "dequantize_weights": (mm.dequantize_weights, {"codes": DRAWN.l1[0], "scales": DRAWN.l1[1]}),
    "dequantize_activations": (mm.dequantize_activations, {"codes": CODES[0], "scales": CODES[1]}),
    "transform": (
        on_copies(mm.transform_weights_for_mega_moe_sm90, False),
        {**PAIRS, "inplace": False, "experts": None},
    ),
    "inverse": (
        on_copies(mm.inverse_transform_weights_for_mega_moe_sm90, True),
        {**READY, "inplace": False, "experts": None},
    ),
    "mark_transformed": (
        on_copies(mm.mark_transformed, True),
        {**READY, "experts": None, "transformed": True, "metadata": None},
    ),
    "is_transformed": (mm.is_transformed, READY),
    "weights_metadata": (mm.weights_metadata, READY),
    "mxfp4_spread": (mm.mxfp4_spread, {"codes": MXFP4[0][0], "e8m0": MXFP4[0][1]}),
    "fp8_from_mxfp4": (
        mm.fp8_from_mxfp4,
        {"codes": MXFP4[0][0], "e8m0": MXFP4[0][1], "dtype": torch.float8_e4m3fn, "rounding": None},
    ),
    "transform of MXFP4": (
        mm.transform_weights_for_mega_moe_sm90,
        {"l1_weights": MXFP4[0], "l2_weights": MXFP4[1], "rounding": None, "experts": None},
    ),
    "moe_reference": (
        moe_reference,
        {
            "x": CODES[0],
            "x_sf": CODES[1],
            "topk_idx": IDS,
            "topk_weights": ROUTER,
            "l1": DRAWN.l1,
            "l2": DRAWN.l2,
            "activation_clamp": None,
            "requantize": True,
            "out_dtype": torch.bfloat16,
        },
    ),
    "expert_counts": (expert_counts, {"topk_idx": IDS, "num_experts": 4}),
    "with_shared_experts": (
        with_shared_experts,
        {
            "topk_idx": IDS,
            "topk_weights": ROUTER,
            "num_experts": 4,
            "num_shared_experts": 1,
            "shared_weight": 1.0,
            "rank": 0,
            "ranks": 1,
        },
    ),
    "swiglu": (swiglu, {"gate": X, "up": X, "clamp": None}),
    "row_diffs": (row_diffs, {"a": X, "b": X}),
    "calc_diff": (calc_diff, {"a": X, "b": X}),
    "get_symm_buffer": (mm.get_symm_buffer_for_mega_moe, BUFFER_SIZES),
    "SymmBuffer": (
        SymmBuffer,
        {"shape": SHAPE, "max_tokens": 64, "device": torch.device("cpu"), "group": None, "max_pool_rows": 4096},
    ),
    "load_experts": (
        load_experts,
        {"path": "nothing", "layer": 1, "device": "cpu", "rank": 0, "ranks": 1, "weight_format": "auto"},
    ),
    "convert": (convert, {"source": "nothing", "target": "nowhere", "weight_format": "fp8", "scheme": None}),
    "import_pack": (mm.import_pack, {"path": "no such file", "root": "/nowhere"}),
    "export_pack": (mm.export_pack, {"path": "/nowhere/pack", "what": None, "cache": None}),
}
CALL = {
    "y": Y,
    **READY,
    "cumulative_local_expert_recv_stats": None,
    "recipe": (128, 128, 128),
    "activation": "swiglu",
    "activation_clamp": None,
    "fast_math": True,
    "num_tokens_bound": None,
    "num_sms": None,
    "variant": None,
}
LAYER = {
    "w13": torch.zeros(1, 256, 256),
    "w2": torch.zeros(1, 256, 128),
    "topk": 2,
    "max_tokens": 64,
    "clamp": None,
    "fast_math": True,
    "inplace": False,
    "workspace": "shared",
}
TAKEN = {"x": X, "topk_idx": IDS, "topk_weights": ROUTER}


REFUSALS = (mm.ConfigError, mm.CheckpointError, mm.PackError, mm.UnsupportedDeviceError)


def attack(function: Callable[..., Any], arguments: dict[str, Any], refusals: tuple[type[Exception], ...]) -> list[str]:
    """What is wrong with how each hostile value ends in each place."""
    wrong = []
    for place in arguments:
        for name, value in HOSTILE.items():
            try:
                function(**{**arguments, place: value})
            except refusals as error:
                if len(str(error)) > 900 or (isinstance(error, mm.ConfigError) and ";" not in str(error)):
                    wrong.append(f"{place} = {name}: says {error}")
            except Exception as error:
                wrong.append(f"{place} = {name}: {type(error).__name__}: {str(error)[:100]}")
    return wrong


@pytest.fixture
def here(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cuda:  # noqa: F811
    monkeypatch.setattr(_api, "place_of", real_place_of_cpu)
    monkeypatch.chdir(tmp_path)
    return cuda


PLACE = _api.place_of


def real_place_of_cpu(device: Any) -> torch.device:
    return PLACE("cpu" if device is None else device)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_every_function(
    here: Cuda, name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    function, arguments = FUNCTIONS[name]
    with override(cache_dir=tmp_path_factory.mktemp("empty")):  # nothing to export, whatever other tests have compiled
        assert attack(function, arguments, REFUSALS) == []
    assert list(tmp_path.iterdir()) == [], "nothing was written where nobody said"


def test_every_argument_of_a_call(here: Cuda, buffer: SymmBuffer):  # noqa: F811
    for function in (mm.fp8_mega_moe, mm.fp8_mega_moe_pingpong):
        arguments = {name: value for name, value in CALL.items() if name != "variant" or function is mm.fp8_mega_moe}
        assert attack(function, {**arguments, "sym_buffer": buffer}, (mm.ConfigError,)) == []


def test_every_argument_of_staging_and_of_a_call_from_bf16(here: Cuda, buffer: SymmBuffer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(_stage, "require_gpu", lambda name, device: None)
    options = {"x_scales": None, "routed_scaling_factor": 1.0}
    assert attack(mm.stage, {"buffer": buffer, **TAKEN, **options, "padded_tokens": None}, (mm.ConfigError,)) == []
    buffers = {
        "buf_x": buffer.x,
        "buf_x_sf": buffer.x_sf,
        "buf_topk_idx": buffer.topk_idx,
        "buf_topk_weights": buffer.topk_weights,
    }
    sizes = {"num_tokens": 3, "group_size": 128, "routed_scaling_factor": 1.0}
    assert attack(mm.mega_moe_pre_dispatch_sm90, {**TAKEN, **buffers, **sizes}, (mm.ConfigError,)) == []
    call = {name: value for name, value in CALL.items() if name not in ("recipe", "activation", "num_tokens_bound")}
    arguments = {**TAKEN, **call, **options, "sym_buffer": buffer}
    assert attack(mega_moe_from_bf16, arguments, (mm.ConfigError,)) == []


def test_every_argument_of_a_call_on_rows_of_this_ranks_experts(here: Cuda, buffer: SymmBuffer):  # noqa: F811
    rows = {"num_rows": torch.tensor([3]), "activation_clamp": None, "fast_math": True}
    arguments = {"y": Y, "l1": L1, "l2": L2, "buffer": buffer}
    assert attack(mm.mega_moe_local_experts, {**arguments, **rows}, (mm.ConfigError,)) == []
    arguments["buffer"] = SymmBuffer(mm.MoEShape(256, 128, 4, 1), 128, torch.device("cpu"))
    for apart in (None, 4):
        rows = {"expert_rows": torch.tensor([1, 1, 1, 0]), "rows_apart": apart, "align": 1}
        assert attack(mm.mega_moe_local_experts, {**arguments, **rows}, (mm.ConfigError,)) == []


def test_every_argument_of_a_buffers_methods(here: Cuda, buffer: SymmBuffer):  # noqa: F811
    assert attack(buffer.prepare, {"variant": "pingpong", "fast_math": True}, (mm.ConfigError,)) == []
    assert attack(buffer.prepare_all, {"fast_math": True}, (mm.ConfigError,)) == []
    assert attack(buffer.kernels.choose, {"tokens": 3, "variant": None, "num_sms": None}, (mm.ConfigError,)) == []
    plan = {"tokens": 3, "variant": None, "fast_math": True, "num_sms": None}
    assert attack(buffer.plan, plan, (mm.ConfigError,)) == []


def test_every_argument_of_a_layer_and_its_call(here: Cuda):
    assert attack(mm.MegaMoE, LAYER, (mm.ConfigError, mm.UnsupportedDeviceError)) == []
    layer = mm.MegaMoE(**LAYER)
    assert attack(layer, {**TAKEN, "padded_tokens": None}, (mm.ConfigError,)) == []
    assert attack(layer.stage, TAKEN, (mm.ConfigError,)) == []
    assert attack(layer.load_weights, {name: LAYER[name] for name in ("w13", "w2")}, (mm.ConfigError,)) == []


def test_every_argument_of_what_reads_a_checkpoint(here: Cuda, tmp_path: Path):
    folder = Model(shared="shared_experts", layers=(1,)).write(tmp_path / "model")
    how = {"path": folder, "layer": 1, "device": "cpu", "weight_format": "auto", "scheme": None, "lossy": False}
    refusals = (mm.ConfigError, mm.CheckpointError, mm.UnsupportedDeviceError)
    assert attack(load_experts, {**how, "rank": 0, "ranks": 1}, refusals) == []
    assert attack(load_shared_experts, how, refusals) == []
    layer = {**how, "max_tokens": 64, "topk": 2, "clamp": "auto", "shared_experts": True}
    assert attack(mm.MegaMoE.from_checkpoint, layer, refusals) == []
    for wrong in ({"lossy": 1}, {"report": 3}):
        with pytest.raises(mm.ConfigError, match=f"{next(iter(wrong))} = . is not supported"):
            convert(folder, tmp_path / "made", "fp8", **wrong)
    assert not (tmp_path / "made").exists()
    with pytest.raises(mm.ConfigError, match="progress = 3 is not supported; allowed: a function, or None"):
        load_experts(**how, progress=3)


def test_what_no_layer_takes_is_refused_before_a_checkpoint_is_read(here: Cuda, tmp_path: Path):
    folder = Model(layers=(1,)).write(tmp_path)
    for wrong in ({"max_tokens": 32769}, {"topk": 33}, {"clamp": -1.0}, {"shared_experts": "no"}):
        read: list[int] = []
        options = {"max_tokens": 64, "device": "cpu", "progress": lambda done, _, read=read: read.append(done), **wrong}
        with pytest.raises(mm.ConfigError, match=next(iter(wrong))):
            mm.MegaMoE.from_checkpoint(folder, 1, **options)
        assert read == []


def test_a_right_call_of_each_function_is_taken(here: Cuda):
    """Else every attack would end in the same refusal."""
    for name, (function, arguments) in FUNCTIONS.items():
        if name not in ("import_pack", "export_pack", "load_experts", "convert"):
            function(**arguments)


def test_no_hostile_value_is_taken_for_a_number_or_a_bound(here: Cuda, buffer: SymmBuffer):  # noqa: F811
    taken = []
    for place, allowed in (
        ("activation_clamp", {"None", "0", "2.5", "inf", "a numpy scalar", "a fraction", "more than 64 bits"}),
        ("recipe", set()),
    ):
        for name, value in HOSTILE.items():
            try:
                mm.fp8_mega_moe(**{**CALL, "sym_buffer": buffer, place: value})
            except mm.ConfigError:
                continue
            if name not in allowed:
                taken.append((place, name))
    assert taken == []
