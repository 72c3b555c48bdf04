"""The operators: graphs without breaks, the bits of eager calls, what torch checks of an operator, and stale names.

Everything that traces is real; the kernel is the reference, on what it finds at the addresses that it is given.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import megamoe_jit as mm
from megamoe_jit._layer.operators import is_traced
from tests.unit.layer.test_calls import DRAWN, Cuda, refused
from tests.unit.layer.test_module import OTHER, QUANTISED, layer_of, ordered
from tests.unit.layer.test_moe import compute, expected, inputs, layer

NO_GPU = torch.cuda.is_available  # as it is before any stand-in


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    made = Cuda(monkeypatch)
    made.kernel = compute
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


class Model(torch.nn.Module):
    """Two layers, with something between them that torch compiles."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.norm = torch.nn.Linear(256, 256)
        self.layers = torch.nn.ModuleList(layer(clamp=0.02, **more) for _ in range(2))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for each in self.layers:
            x = each(self.norm(x.float()).bfloat16(), ids, weights)
        return x


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> Model:
    made = Model()
    made(*inputs(3))  # torch's own tracers ask for CUDA's random state where there seems to be a GPU
    monkeypatch.setattr(torch.cuda, "is_available", NO_GPU)
    return made


def operators_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "megamoe" in str(node.target)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_break_and_with_the_bits_of_eager_calls(model: Model, backend: str):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for given in (inputs(20), inputs(20), inputs(300)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = compiled(*given)
            assert torch.equal(y, model(*given))
            assert not y.requires_grad


def test_what_was_compiled_in_place_is_not_copied(model: Model):
    one, given = model.layers[0], inputs(5)
    one.compile(fullgraph=True, backend="aot_eager")
    y, other = one(*given), copy.deepcopy(one)
    other.load_weights(*OTHER)
    assert torch.equal(other(*given), layer_of_other()(*given))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(one(*given), y)
    assert torch.equal(y, expected(*given, 0.02))


def test_sizes_may_be_symbols(model: Model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(*inputs(20))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for given in (inputs(7), inputs(300)):
                assert torch.equal(compiled(*given), model(*given))


def test_one_compiled_block_serves_all_layers_that_share(model: Model):
    """Else the layers of a model would be as many compilations, of which torch allows eight."""

    def block(each: mm.MegaMoE, *given: torch.Tensor) -> torch.Tensor:
        return each(*given) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    given = inputs(5)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model.layers[1].load_weights(*OTHER)
        for each in model.layers:
            assert torch.equal(compiled(each, *given), each(*given) + 1)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_and_called(model: Model, strict: bool):
    given = inputs(20)
    with torch.no_grad():
        exported = torch.export.export(model, given, strict=strict)
    assert operators_of(exported.graph) == ["megamoe_jit.moe.default"] * 2
    assert sorted(exported.state_dict) == ["norm.bias", "norm.weight"], "no second copy of the weights in plain order"
    assert torch.equal(exported.module()(*given), model(*given))


def test_exported_and_read_again(model: Model):
    given, file = inputs(20), io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(model.layers[0], given), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(*given), model.layers[0](*given))


def test_tracers_that_run_what_they_trace_see_the_operator(model: Model):
    given = inputs(5)
    traced = make_fx(model.layers[0])(*given)
    assert operators_of(traced.graph) == ["megamoe_jit.moe.default"]
    again = inputs(5)
    assert torch.equal(traced(*again), model.layers[0](*again))


def test_eager_calls_take_no_operator(model: Model, monkeypatch: pytest.MonkeyPatch):
    assert not is_traced()
    monkeypatch.setattr(torch.ops.megamoe_jit, "moe", None)
    with torch.inference_mode():
        model(*inputs(3))


def test_compiled_code_reads_loaded_and_exchanged_weights(model: Model):
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="aot_eager")
    given = inputs(5)
    compiled(*given)
    model.layers[0].load_weights(*OTHER)
    other = layer_of_other()
    assert torch.equal(compiled(*given), other(*given))
    names = ("l1_codes", "l1_scales", "l2_codes", "l2_scales")
    old = dict(zip(names, ordered(DRAWN.l1, DRAWN.l2), strict=True))

    def call(*given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model.layers[0], old, given)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*given), expected(*given, 0.02))


def layer_of_other() -> mm.MegaMoE:
    made = layer_of(*QUANTISED)
    made.clamp = 0.02
    return made


def arguments(it: mm.MegaMoE, tokens: int = 5) -> tuple[object, ...]:
    """torch's check compares FP8 numbers by a product that it does not have."""
    return *inputs(tokens), it.l1_codes.view(torch.uint8), it.l1_scales, it.l2_codes.view(torch.uint8), it.l2_scales


@pytest.mark.parametrize("grad", [False, True])
def test_torch_finds_nothing_wrong_with_the_operators(model: Model, grad: bool):
    it, op = model.layers[0], torch.ops.megamoe_jit
    x, *given = arguments(it)
    x = x.requires_grad_(grad)
    for found in (
        torch.library.opcheck(op.moe.default, (x, *given, it._workspace), {"clamp": 0.5}),
        torch.library.opcheck(op.moe_into.default, (torch.empty_like(x.detach()), x, *given, it._workspace)),
    ):
        assert set(found.values()) == {"SUCCESS"}


def test_the_mutating_operator_writes_where_it_is_told(model: Model):
    given, it = arguments(model.layers[0]), model.layers[0]
    y = torch.zeros(5, 256, dtype=torch.bfloat16)

    def call(y: torch.Tensor) -> torch.Tensor:
        torch.ops.megamoe_jit.moe_into(y, *given, it._workspace, 0.02)
        return y * 2

    doubled = torch.compile(call, fullgraph=True, backend="aot_eager")(y)
    assert torch.equal(y, it(*given[:3]))
    assert torch.equal(doubled, y * 2)
    refused(lambda: torch.ops.megamoe_jit.moe_into(y[:4], *given, it._workspace), "y has shape (4, 256); allowed: (5")


def test_operators_check_as_calls_do(model: Model, cuda: Cuda):
    it = model.layers[0]
    x, ids, *given = arguments(it)
    before = len(cuda.launches)
    refused(lambda: torch.ops.megamoe_jit.moe(x, ids[:4], *given, it._workspace), "topk_idx has shape (4, 2)")
    refused(lambda: torch.ops.megamoe_jit.moe(x, ids, *given, it._workspace, -1.0), "activation_clamp = -1.0")
    assert len(cuda.launches) == before


def test_a_name_outlives_its_layer_while_others_share_it_and_is_one_clear_error_then(model: Model):
    one = model.layers[0]
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    given, name = inputs(5), one._workspace
    y, copied = compiled(*given), copy.deepcopy(one)
    assert torch.equal(torch.compile(copied, fullgraph=True, backend="eager")(*given), y)
    for each in (*model.layers, copied):
        each.destroy()
    says = f"workspace = '{name}' is of no layer in this process; allowed: none", "for as long as it is called"
    refused(lambda: compiled(*given), *says)
    wanted = arguments(one)
    refused(lambda: torch.ops.megamoe_jit.moe(*wanted, name), *says)


def test_nothing_is_kept_alive_by_name(cuda: Cuda):
    for workspace in ("own", "shared"):
        made = layer(workspace=workspace)
        name = made._workspace
        del made
        refused(lambda n=name: torch.ops.megamoe_jit.moe(*arguments_of_nobody(), n), "is of no layer")


def arguments_of_nobody() -> tuple[torch.Tensor, ...]:
    return *inputs(3), *(tensor.clone() for tensor in ordered(DRAWN.l1, DRAWN.l2))


def test_the_library_is_there_with_the_layer_and_not_before():
    code = (
        "import sys, megamoe_jit\n"
        "assert 'torch' not in sys.modules\n"
        "megamoe_jit.MegaMoE\n"
        "import torch\n"
        "both = torch.ops.megamoe_jit.moe, torch.ops.megamoe_jit.moe_into\n"
        "print(*(each.default._schema.is_mutable for each in both))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("False True\n", 0), done.stderr
