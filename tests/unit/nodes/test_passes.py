"""What is launched for a pass over rows between nodes: the kernels themselves are looked at on a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from megamoe_jit._device.params import NodesParams
from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes import pass_kernels as _pass_kernels
from megamoe_jit._nodes.exchange import Rows
from megamoe_jit._nodes.pass_kernels import PassKernels
from megamoe_jit._nodes.passes import Routes, TorchPasses
from megamoe_jit._spec.any_layer import Pass, PassSpec
from megamoe_jit._spec.kinds import spec_from_json, spec_of_kernel_name
from tests.unit.layer.test_calls import HERE, SMS, Cuda
from tests.unit.nodes.world import ROUTES, SHAPE, batch

NODES = 2
EXPERTS = SHAPE.experts // NODES


def at(address: int, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """What lies there."""
    count = torch.Size(sizes).numel()
    if not count:
        return torch.empty(sizes, dtype=dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(sizes)


def run(step: Pass, blocks: int, p: NodesParams) -> None:
    """What the kernel does, by the definition, with nothing but its parameters."""
    rows, defined = p.rows if step is Pass.UNPACK else p.tokens, TorchPasses()
    dtypes, words = (torch.float8_e4m3fn, torch.float32, torch.int64, torch.float32), list(p.part_words)
    if step is Pass.ROUTE:
        found = defined.route(at(p.parts[2], torch.int64, p.tokens, p.topk), blocks, p.experts)
        at(p.places, torch.int32, blocks, p.tokens).copy_(found.places)
        at(p.counts, torch.int64, blocks).copy_(found.counts)
        return
    parts = Rows(*(at(p.parts[i], dtypes[i], rows, words[i] * 4 // dtypes[i].itemsize) for i in range(4)))
    routes = None
    if p.places:
        routes = Routes(at(p.places, torch.int32, p.nodes, p.tokens), at(p.counts, torch.int64, p.nodes))
    if step is Pass.PACK:
        packed = defined.pack(parts, routes)
        at(p.packed, torch.int32, *packed.shape).copy_(packed)
    elif step is Pass.UNPACK:
        defined.unpack(at(p.packed, torch.int32, rows, sum(words)), parts, p.first_expert)
    else:
        assert blocks * 256 * 8 >= p.tokens * p.hidden > (blocks - 1) * 256 * 8
        dtype = {Pass.SUM_BF16: torch.bfloat16, Pass.SUM_FP32: torch.float32}[step]
        count = p.rows * p.nodes if routes is None else int(routes.counts.sum())
        back, y = at(p.back, dtype, count, p.hidden), at(p.y, torch.bfloat16, p.tokens, p.hidden)
        defined.sum_nodes(back, y, p.nodes, routes)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Passes as they are launched, by the definition; and what was launched on which stream."""
    cuda, launched = Cuda(monkeypatch), []

    def launcher(loaded: SimpleNamespace, params: NodesParams, **how: object) -> SimpleNamespace:
        assert how == {"threads": 256, "cooperative": False}

        def launch(blocks: int, stream: int) -> None:
            assert blocks > 0
            launched.append((loaded.spec.kind, blocks, stream))
            run(loaded.spec.kind, blocks, NodesParams.from_buffer_copy(params))

        return SimpleNamespace(launch=launch)

    def load(spec: PassSpec, index: int, *, param_bytes: int) -> SimpleNamespace:
        assert (index, param_bytes) == (cuda.current, ctypes.sizeof(NodesParams))
        return SimpleNamespace(spec=spec)

    monkeypatch.setattr(_pass_kernels, "sm_count", lambda device: SMS)
    monkeypatch.setattr(_pass_kernels, "load_kernel", load)
    monkeypatch.setattr(_pass_kernels, "Launcher", launcher)
    return SimpleNamespace(cuda=cuda, launched=launched, passes=PassKernels(HERE))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("route", ROUTES)
def test_a_pass_is_a_launch_with_the_bits_of_its_definition(kernels: SimpleNamespace, tokens: int, route: str):
    passes, defined, rows = kernels.passes, TorchPasses(), batch(tokens, route, seed=tokens)
    routes, right = (it.route(rows.topk_idx, NODES, EXPERTS) for it in (passes, defined))
    assert torch.equal(routes.places, right.places)
    assert torch.equal(routes.counts, right.counts)
    expected = defined.pack(rows, right)
    count = len(expected)
    assert torch.equal(passes.pack(rows, routes)[:count], expected)
    into = [Rows(*(torch.zeros(count, *t.shape[1:], dtype=t.dtype) for t in rows.tensors)) for _ in range(2)]
    for it, arrived in zip((passes, defined), into, strict=True):
        it.unpack(expected, arrived, EXPERTS)
    for mine, theirs in zip(into[0].tensors, into[1].tensors, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    for dtype in (torch.bfloat16, torch.float32):
        for how, parts in ((routes, count), (None, NODES * (tokens + 2))):
            back = torch.randn(parts, SHAPE.hidden).to(dtype)
            y, total = (torch.empty(tokens, SHAPE.hidden, dtype=torch.bfloat16) for _ in range(2))
            passes.sum_nodes(back, y, NODES, how)
            defined.sum_nodes(back, total, NODES, how)
            assert torch.equal(y, total)
    expected_steps = [Pass.ROUTE] + [Pass.PACK] * (tokens > 0) + [Pass.UNPACK] * (count > 0)
    expected_steps += ([Pass.SUM_BF16] * 2 + [Pass.SUM_FP32] * 2) * (tokens > 0)
    assert [step for step, _, _ in kernels.launched] == expected_steps


def test_passes_are_on_the_current_stream_of_their_gpu(kernels: SimpleNamespace):
    """Whichever GPU is the current one."""
    kernels.cuda.stream, kernels.cuda.current = kernels.cuda.b, 1
    kernels.passes.route(torch.zeros(3, 2, dtype=torch.int64), NODES, EXPERTS)
    assert kernels.launched == [(Pass.ROUTE, NODES, kernels.cuda.b.cuda_stream)]
    assert kernels.cuda.current == 1


def test_specs_of_passes_come_back_from_their_names_and_data():
    for spec in map(PassSpec, Pass):
        assert spec_of_kernel_name(spec.kernel_name) == spec
        assert spec_from_json(spec.to_json()) == spec
    with pytest.raises(ConfigError, match=r"allowed: a table with nodes, \['route', 'pack'"):
        spec_from_json({"nodes": "smoke"})
