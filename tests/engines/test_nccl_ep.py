"""Rows by NCCL-EP, through the classes of its release: what its library is asked in a call, and no more than it takes.

The bindings and NCCL itself are stand-ins, so nothing travels. Names, arguments and checks are the package's own.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from megamoe_jit._nodes.exchange import Batch
from megamoe_jit._nodes.memory import staging
from megamoe_jit._nodes.nccl_ep import TESTED, NcclEpExchange
from megamoe_jit._spec import MoEShape
from tests.engines.sources import RealSources

SHAPE, RANKS, ROWS = MoEShape(512, 128, 8, 2), 2, 6
REAL = ("nccl.ep", "nccl._extensions._binding_helpers") + tuple(
    f"nccl.ep.{name}" for name in ("allocator", "enums", "group", "handle", "tensor", "interop", "interop.torch")
)
CPU = torch.device("cpu")


class _Fields(type):
    """A struct of the bindings has whatever fields the package's own class names."""

    def __getattr__(cls, name: str) -> None:
        return None


class Struct(metaclass=_Fields):
    """One of the library's structs, found again by its address."""

    by_address: ClassVar[dict[int, Struct]] = {}

    @property
    def ptr(self) -> int:
        self.by_address[id(self)] = self
        return id(self)


STRUCTS = ("GroupConfig", "HandleConfig", "DispatchConfig", "CombineConfig", "LayoutInfo", "DispatchInputs")
STRUCTS += ("DispatchOutputs", "CombineInputs", "CombineOutputs", "AllocConfig", "Tensor")
CALLS = ("create_group", "create_handle", "update_handle", "dispatch", "combine", "handle_destroy", "group_destroy")


@pytest.fixture(params=TESTED)
def asked(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the library was asked: names, and arguments with structs in place of addresses."""
    log: list[Any] = []

    def calls(name: str) -> Any:
        def call(*given: Any) -> int:
            log.append((name, [Struct.by_address.get(each, each) for each in given]))
            return 40 + len(log)

        return call

    for variable in ("NCCL_EP_HOME", "NCCL_HOME"):  # which the package sets
        monkeypatch.setenv(variable, "")
    with RealSources(folder / f"nccl-extensions-{request.param}", "nccl", REAL):
        bindings = importlib.import_module("nccl._extensions.bindings.nccl_ep")
        for name in STRUCTS:
            setattr(bindings, name, type(name, (Struct,), {}))
        for name in CALLS:
            setattr(bindings, name, calls(name))
        bindings.tensor_dtype = SimpleNamespace(itemsize=64)
        importlib.import_module("nccl.core.cuda").get_stream_ptr = lambda stream: stream
        importlib.import_module("nccl.core.interop.torch").resolve_tensor = lambda t: (t.data_ptr(), t.numel(), 7, CPU)
        interop = importlib.import_module("nccl.ep.interop.torch")
        interop.get_nccl_comm_from_group = lambda group: SimpleNamespace(ptr=1)
        yield log
    Struct.by_address.clear()


def shape(struct: Any) -> tuple[int, ...]:
    """Of a tensor's descriptor, by its address."""
    assert struct in Struct.by_address, "the package has taken a tensor"
    found = Struct.by_address[struct]
    return tuple((ctypes.c_size_t * found.ndim_).from_address(found.sizes))


def test_a_call_is_what_the_package_takes(asked: list[Any]):
    exchange = NcclEpExchange(SimpleNamespace(size=lambda: RANKS), SHAPE.experts, ROWS, SHAPE.hidden)
    rows, into = staging(SHAPE, ROWS, CPU), staging(SHAPE, RANKS * ROWS, CPU)
    partial, y = torch.ones(RANKS * ROWS, SHAPE.hidden, dtype=torch.bfloat16), torch.empty(4, SHAPE.hidden).bfloat16()
    for _ in range(2):
        arrived = exchange.dispatch(Batch(rows, 4), into, 0, SHAPE.experts // RANKS)
        assert arrived.rows == RANKS * ROWS
        exchange.combine(arrived, partial, y)
    exchange.destroy()
    names = [name for name, _ in asked]
    first = ["create_group", "create_handle", "dispatch", "combine"]
    assert names == [*first, "update_handle", "dispatch", "combine", "handle_destroy", "group_destroy"]
    group = asked[0][1][1]
    assert (group.algorithm, group.num_experts, group.max_dispatch_tokens_per_rank) == (1, SHAPE.experts, ROWS)
    assert group.max_recv_tokens_per_rank >= ROWS
    assert group.max_token_bytes % 16 == 0, "which the high-throughput algorithm asks for"
    layout, ids, info = asked[1][1][1:4]
    assert (layout, info.recv_topk_idx_kind) == (3, 1), "flat, and the numbers of the rank's own experts"
    assert ids.ndim_ == 2
    assert shape(info.recv_total_counter) == (1,)


def test_rows_and_scales_are_forwarded_as_the_recipe_has_them(asked: list[Any]):
    exchange = NcclEpExchange(SimpleNamespace(size=lambda: RANKS), SHAPE.experts, ROWS, SHAPE.hidden)
    exchange.dispatch(Batch(staging(SHAPE, ROWS, CPU), 4), staging(SHAPE, RANKS * ROWS, CPU), 0, SHAPE.experts // RANKS)
    inputs, outputs, _, config, _ = asked[-1][1][1:]
    assert (config.quant_recipe, config.pass_direction) == (1, 0)
    for name, columns in (("tokens", 512), ("scales", 4), ("topk_weights", SHAPE.topk)):
        assert shape(getattr(inputs, name)) == (ROWS, columns)
        assert shape(getattr(outputs, name)) == (RANKS * ROWS, columns)
    assert shape(outputs.topk_idx) == (RANKS * ROWS, SHAPE.topk)
