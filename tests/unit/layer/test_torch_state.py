"""What a program sets in torch for itself (defaults, autocast, modes) changes nothing in the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit import reference
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._check.verify import run_scenario
from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._device.params import Params
from megamoe_jit._layer import calls as _api
from megamoe_jit._layer import memory as _memory
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import calc_diff, expert_counts, moe_reference
from tests.stubs import changed
from tests.unit.layer.test_calls import DRAWN, HERE, SHAPE, Cuda, refused
from tests.unit.layer.test_moe import at, compute, same

PACKAGE = Path(__file__).resolve().parents[3] / "megamoe_jit"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
#: Functions of torch that make a tensor out of nothing, for which the defaults are asked.
FACTORIES = re.compile(
    "(arange|eye|full|linspace|logspace|normal|ones|tensor|zeros|asarray|as_tensor|scalar_tensor|tri[lu]_indices)"
    "|(empty(_permuted|_strided)?|rand(int|n|perm)?)"
)


def unnamed(tree: ast.AST) -> list[str]:
    """Calls of torch's factories that leave device or dtype to the defaults of the program."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id in ("torch", "symm_mem") and FACTORIES.fullmatch(name)):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if None not in given and not {"device", "dtype"} <= given:
            found.append(f"line {node.lineno}: {owner.id}.{name} without {sorted({'device', 'dtype'} - given)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_names_its_device_and_dtype(path: Path):
    assert unnamed(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_that_test_finds_what_it_looks_for():
    given = (
        "torch.zeros(3); torch.ones(2, device=d); torch.empty(1, dtype=t, device=d); torch.empty_like(x); np.ones(3)"
    )
    assert unnamed(ast.parse(given)) == [
        "line 1: torch.zeros without ['device', 'dtype']",
        "line 1: torch.ones without ['dtype']",
    ]


STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "default device": lambda: changed(lambda: None, torch.set_default_device, "meta"),  # None: no mode is left on
    "device context": lambda: torch.device("meta"),
    "default bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "inference mode": torch.inference_mode,
    "no gradients": partial(torch.set_grad_enabled, False),
    "gradients": partial(torch.set_grad_enabled, True),
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "deterministic": lambda: changed(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2),
    "bfloat16 products": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
}
with torch.device("meta"):
    torch.empty(0)  # torch remembers the factories as they are now, before any is replaced by a stand-in
#: Drawn before anything is set: values of both matrices, and the inputs of a call.
GEN = torch.Generator().manual_seed(5)
W13, W2 = torch.randn(4, 256, 256, generator=GEN) * 0.05, torch.randn(4, 256, 128, generator=GEN) * 0.05
X = torch.randn(96, 256, generator=GEN).bfloat16()
IDS = torch.randint(-1, 4, (96, 2), generator=GEN)
ROUTED = torch.rand(96, 2, generator=GEN)
ONES = torch.full((96, 256), 1.0, dtype=torch.bfloat16)


def work() -> list[torch.Tensor]:
    """What a program does with the package, and whatever comes out of it."""
    seen = []
    for weights in ((W13, W2), (DRAWN.l1, DRAWN.l2)):
        layer = mm.MegaMoE(*weights, topk=2, max_tokens=128, clamp=10.0)
        seen += [*layer.l1, *layer.l2, layer(X, IDS, ROUTED)]
        layer.check()
        layer.destroy()
    codes, scales = mm.quantize_activations(X)
    l1, l2 = mm.quantize_weights(W13), mm.quantize_weights(W2)
    ordered = mm.transform_weights_for_mega_moe_sm90(l1, l2)
    back = mm.inverse_transform_weights_for_mega_moe_sm90(*ordered, experts=[1, 3])
    expected = moe_reference(codes, scales, IDS, ROUTED, l1, l2, activation_clamp=10.0, out_dtype=torch.float32)
    seen += [codes, scales, *l1, *l2, *ordered[0], *ordered[1], *back[0], *back[1], expected]
    seen += [mm.dequantize_activations(codes, scales), mm.dequantize_weights(*l1), expert_counts(IDS, 4)]
    return [*seen, torch.full((1,), calc_diff(expected, ONES), dtype=torch.float64, device="cpu")]


def gpu(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU whose kernel is the reference."""

    def kernel(params: Params) -> None:
        with torch.inference_mode(False), torch.no_grad():
            compute(params)
            if params.stats:
                ids = at(params.peers[0] + params.topk_ids, torch.int64, params.tokens, 2)
                at(params.stats, torch.int32, 4).add_(expert_counts(ids, 4))

    made = Cuda(monkeypatch)
    made.kernel = kernel
    return made


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return gpu(monkeypatch)


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    """What comes out where nothing is set."""
    with pytest.MonkeyPatch.context() as patch:
        gpu(patch)
        return work()


@pytest.mark.parametrize("name", STATES)
def test_everything_gives_the_same_bits_in_every_state(cuda: Cuda, plain: list[torch.Tensor], name: str):
    with STATES[name]():
        seen = work()
    assert [each.dtype for each in seen] == [each.dtype for each in plain]
    differ = [i for i, (a, b) in enumerate(zip(seen, plain, strict=True)) if a.device != HERE or not same(a, b)]
    assert differ == []
    assert not any(each.requires_grad for each in seen)


@pytest.mark.parametrize("name", STATES)
def test_a_layer_made_in_one_state_serves_in_another(cuda: Cuda, plain: list[torch.Tensor], name: str):
    with STATES[name]():
        layer = mm.MegaMoE(W13, W2, topk=2, max_tokens=128, clamp=10.0)
    assert same(layer(X, IDS, ROUTED), plain[4])
    for codes, _ in (layer.l1, layer.l2):
        raw = codes.view(torch.uint8)
        raw[:] = raw[[1, 0, 3, 2]]  # experts are exchanged
    moved = torch.where(IDS < 0, IDS, IDS ^ 1)
    for scales in (layer.l1[1], layer.l2[1]):
        scales[:] = scales[[1, 0, 3, 2]]
    assert same(layer(X, moved, ROUTED), plain[4])


@pytest.mark.parametrize("name", STATES)
def test_verify_gives_the_same_verdict_in_every_state(cuda: Cuda, name: str):
    def buffer(_: None, experts: int, capacity: int, topk: int, hidden: int, intermediate: int) -> SymmBuffer:
        return SymmBuffer(MoEShape(hidden, intermediate, experts, topk), capacity, HERE)

    api = SimpleNamespace(**{name: getattr(mm, name) for name in mm.__all__ if "mega_moe" in name})
    api.get_symm_buffer_for_mega_moe = buffer
    for data, route in (("outliers", "lognormal"), ("ladder", "hot")):
        scenario = Scenario("state", SHAPE, 60, 128, data=data, route=route, masked_ratio=0.1)
        plain = run_scenario(scenario, "auto", "cpu", api=api)
        with STATES[name]():
            outcome = run_scenario(scenario, "auto", "cpu", api=api)
        assert outcome.passed, outcome.reason
        assert repr(outcome) == repr(plain)


def test_the_reference_puts_back_what_the_caller_had_set(monkeypatch: pytest.MonkeyPatch):
    inputs = (*mm.quantize_activations(X), IDS, ROUTED, DRAWN.l1, DRAWN.l2)
    with STATES["deterministic"](), STATES["bfloat16 products"](), STATES["autocast"]():
        moe_reference(*inputs)
        monkeypatch.setattr(reference, "_expert", lambda *_, **__: 1 / 0)  # fails inside
        with pytest.raises(ZeroDivisionError):
            moe_reference(*inputs)
        assert torch.get_deterministic_debug_mode() == 2
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_autocast_enabled("cpu")


# -- a graph is being captured ------------------------------------------------------------------------------------


class Touched(Exception):
    """Something was done that a capture does not survive."""


def touch(*_: object, **__: object) -> None:
    raise Touched


@pytest.fixture
def capturing(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A capture on the current stream, in which neither memory nor another rank nor the device may be asked."""
    cuda.capturing = True
    for owner, name in (
        *((torch, name) for name in ("empty", "zeros")),
        *((torch.cuda, name) for name in ("synchronize", "mem_get_info", "empty_cache", "is_available")),
        (_api, "collectively"),
        (_memory, "collectively"),
    ):
        monkeypatch.setattr(owner, name, touch)
    return cuda


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda group: mm.get_symm_buffer_for_mega_moe(group, 4, 128, 2, 256, 128),
        lambda group: SymmBuffer(SHAPE, 128, HERE, group),
        lambda group: mm.MegaMoE(W13, W2, topk=2, max_tokens=128),
    ],
    ids=["get_symm_buffer_for_mega_moe", "SymmBuffer", "MegaMoE"],
)
def test_a_buffer_made_in_a_capture_is_refused_before_anything_is_touched(capturing: Cuda, make: Callable, ranks: int):
    group = None if ranks == 1 else SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    says = "a buffer cannot be made while a CUDA graph is being captured", "make it before the capture"
    refused(lambda: make(group), *says, kind=mm.CaptureError)
    assert capturing.events == []


def test_a_context_that_cannot_say_whether_it_captures_is_left_to_what_comes_next(monkeypatch: pytest.MonkeyPatch):
    def broken() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", broken)
    refuse_capture("it cannot be done", "do it later")


def test_the_reference_is_refused_in_a_capture(cuda: Cuda, monkeypatch: pytest.MonkeyPatch):
    """It waits for the device, on a GPU."""
    inputs = (*mm.quantize_activations(X), IDS, ROUTED, DRAWN.l1, DRAWN.l2)
    cuda.capturing = True
    moe_reference(*inputs)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for action in (lambda: moe_reference(*inputs), lambda: expert_counts(IDS, 4), lambda: calc_diff(X, X)):
        refused(action, "the reference waits for the device", "outside of the capture", kind=mm.CaptureError)
