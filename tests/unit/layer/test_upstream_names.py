"""The interface is DeepGEMM's for SM90: its names, their order and defaults, and what only it has.

`upstream_sm90.json` notes the facts of a released package; where that package is installed, it is asked too.
"""

from __future__ import annotations

import inspect
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer import calls as _api
from tests.unit.layer.test_calls import DRAWN, L1, L2, SHAPE, Cuda, buffer, call, cuda, refused, uses  # noqa: F401

FACTS = json.loads(Path(__file__).with_name("upstream_sm90.json").read_text(encoding="utf-8"))
FUNCTIONS: dict[str, list[dict[str, Any]]] = FACTS["functions"]
#: Required there. Here their default is None, which is refused, so that the old names can be given instead.
BY_OLD_NAME = {"l1_weights", "l2_weights", "sym_buffer"}
OURS = [name for name in FUNCTIONS if hasattr(mm, name)]


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_every_function_is_there():
    staging = {"mega_moe_pre_dispatch_sm90"}
    assert set(FUNCTIONS) - staging <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_parameters_are_upstreams_in_its_order(name: str):
    parameters = inspect.signature(getattr(mm, name)).parameters.values()
    ours = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in ours] == [each["name"] for each in FUNCTIONS[name]]
    for parameter, there in zip(ours, FUNCTIONS[name], strict=True):
        if "default" in there:
            assert plain(parameter.default) == there["default"], parameter.name
        elif parameter.name in BY_OLD_NAME:
            assert parameter.default in (None, parameter.empty)
        else:
            assert parameter.default is parameter.empty, parameter.name
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY), "a call need not know them"


def test_an_installed_package_is_as_noted():
    try:
        version = metadata.version(FACTS["package"])
    except metadata.PackageNotFoundError:
        version = None
    if version is None:
        return  # the noted facts stand alone
    deep_gemm = pytest.importorskip(FACTS["module"])
    for name, noted in FUNCTIONS.items():
        there = inspect.signature(getattr(deep_gemm, name)).parameters.values()
        found = [
            {"name": p.name} if p.default is p.empty else {"name": p.name, "default": plain(p.default)} for p in there
        ]
        assert found == noted, f"{name} of {FACTS['package']} {version}"


def test_weights_by_name_and_by_their_old_names(cuda: Cuda, buffer):  # noqa: F811
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.fp8_mega_moe(y=y, l1_weights=L1, l2_weights=L2, sym_buffer=buffer)
        mm.transform_weights_for_mega_moe_sm90(l1_weights=DRAWN.l1, l2_weights=DRAWN.l2)
    for old in (
        lambda: mm.fp8_mega_moe(y, l1=L1, l2=L2, sym_buffer=buffer),
        lambda: mm.fp8_mega_moe_pingpong(y, l1=L1, l2=L2, sym_buffer=buffer),
        lambda: mm.transform_weights_for_mega_moe_sm90(l1=DRAWN.l1, l2=DRAWN.l2),
        lambda: mm.inverse_transform_weights_for_mega_moe_sm90(l1=L1, l2=L2),
    ):
        with pytest.warns(DeprecationWarning, match="now named l1_weights and l2_weights") as caught:
            old()
        assert len(caught) == 1
        assert caught[0].filename == __file__
    assert len(cuda.launches) == 3
    refused(lambda: mm.fp8_mega_moe(y, L1, L2, buffer, l1=L1), "l1_weights and l1 were given; allowed: l1_weights")
    refused(lambda: mm.fp8_mega_moe(y, l1=L1, sym_buffer=buffer), "l2: NoneType given")
    refused(lambda: mm.transform_weights_for_mega_moe_sm90(DRAWN.l1), "l2: NoneType given")


SIZES = (None, 4, 64, 2, 256, 128)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What buffers are made of."""
    seen: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_api, "SymmBuffer", lambda *given: seen.append(given))
    return seen


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), {}),
        ((0, None, "fp8xfp4", "swiglu"), {}),
        ((0, True, "fp8xfp8"), {}),
        ((True,), {}),
        ((True, "swiglu"), {}),
        ((), {"num_shared_experts": 0, "use_fp8_dispatch": True, "mma_type": "fp8xfp4", "activation": "swiglu"}),
    ],
)
def test_a_buffer_by_either_order_and_with_neutral_values(made: list[tuple], more: tuple, named: dict):
    mm.get_symm_buffer_for_mega_moe(*SIZES, *more, **named, device="cpu")
    assert made[0][:2] == (SHAPE, 64)


@pytest.mark.parametrize(
    ("more", "named", "says"),
    [
        ((-1,), {}, "shared = -1 is not supported; allowed: 0 to"),
        ((0, False), {}, "use_fp8_dispatch = False is not supported; allowed: True or None"),
        ((False,), {}, "use_fp8_dispatch = False"),
        ((True, "gelu"), {}, "activation = 'gelu' is not supported; allowed: 'swiglu'"),
        ((), {"mma_type": "bf16xbf16"}, "mma_type = 'bf16xbf16' is not supported; allowed: 'fp8x...'"),
        ((), {"mma_type": None}, "mma_type = None is not supported"),
        ((), {"activation": "situ"}, "activation = 'situ' is not supported; allowed: 'swiglu'"),
    ],
)
def test_what_only_upstream_has_is_refused_by_name(made: list[tuple], more: tuple, named: dict, says: str):
    refused(lambda: mm.get_symm_buffer_for_mega_moe(*SIZES, *more, **named, device="cpu"), says)
    assert made == []


@pytest.mark.parametrize("bound", [2, 129, True, 64.0, "64", 10**400])
def test_a_bound_of_tokens_is_checked(cuda: Cuda, buffer, bound: object):  # noqa: F811
    refused(lambda: call(buffer, num_tokens_bound=bound), "num_tokens_bound = ", "allowed: 3, the tokens of y, to 128")
    call(buffer, num_tokens_bound=128)
    assert len(cuda.launches) == 1
