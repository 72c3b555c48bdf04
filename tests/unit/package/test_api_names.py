"""The public face: complete, lazy, and with the signatures that callers of DeepGEMM's SM90 layer use."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe_jit
from megamoe_jit import _errors

REQUIRED = inspect.Parameter.empty
CALL = {
    "y": REQUIRED,
    "l1": REQUIRED,
    "l2": REQUIRED,
    "sym_buffer": REQUIRED,
    "cumulative_local_expert_recv_stats": None,
    "recipe": (128, 128, 128),
    "activation": "swiglu",
    "activation_clamp": None,
    "fast_math": True,
}
#: Positional parameters and their defaults.
CONTRACT = {
    "get_symm_buffer_for_mega_moe": {
        "group": REQUIRED,
        "num_experts": REQUIRED,
        "num_max_tokens_per_rank": REQUIRED,
        "num_topk": REQUIRED,
        "hidden": REQUIRED,
        "intermediate_hidden": REQUIRED,
        "use_fp8_dispatch": True,
        "activation": "swiglu",
    },
    "fp8_mega_moe": CALL,
    "fp8_mega_moe_pingpong": CALL,
    "fp8_mega_moe_cooperative": CALL,
}
FIRST_TWO = ("transform_weights_for_mega_moe_sm90", "inverse_transform_weights_for_mega_moe_sm90")
ERRORS = {
    *("MegaMoeError", "ConfigError", "UnsupportedDeviceError", "ToolchainError", "RenderError", "CompileError"),
    *("PerformanceLossError", "KernelMissingError", "LoadError", "LaunchError", "CaptureError"),
    *("RankMismatchError", "PeerTimeoutError", "DeviceFaultError"),
}


def test_every_name_is_there_and_sorted():
    names = megamoe_jit.__all__
    assert names == sorted(set(names))
    assert dir(megamoe_jit) == names
    assert [name for name in names if getattr(megamoe_jit, name) is None] == []
    assert set(CONTRACT) | set(FIRST_TWO) | ERRORS <= set(names)


def test_nothing_public_is_left_out():
    """Every name that the package's own text imports is exported, and every lazy one is known to type checkers."""
    text = Path(megamoe_jit.__file__).read_text()
    imported = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megamoe_jit.")
        for alias in node.names
    }
    assert imported == set(megamoe_jit.__all__)
    assert set(megamoe_jit._LAZY) <= imported
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = megamoe_jit.no_such_name


def test_lazy_names_are_found_where_they_are_said_to_be():
    for name, module in megamoe_jit._LAZY.items():
        assert getattr(importlib.import_module(f"megamoe_jit.{module}"), name) is getattr(megamoe_jit, name)


@pytest.mark.parametrize("name", list(CONTRACT))
def test_signature(name):
    function = getattr(megamoe_jit, name)
    parameters = inspect.signature(function).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(CONTRACT[name].items())
    extra = [p for p in parameters if p.name not in positional]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not REQUIRED for p in extra)
    assert function.__doc__


@pytest.mark.parametrize("name", FIRST_TWO)
def test_weight_transforms_take_both_layers_first(name):
    parameters = list(inspect.signature(getattr(megamoe_jit, name)).parameters.values())
    assert [p.name for p in parameters[:2]] == ["l1", "l2"]
    assert [p.default for p in parameters[:2]] == [REQUIRED, REQUIRED]
    assert all(p.default is not REQUIRED for p in parameters[2:])


def test_errors_have_one_root():
    own = {n for n, v in vars(_errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert own >= ERRORS
    assert own <= set(megamoe_jit.__all__)
    assert all(issubclass(getattr(megamoe_jit, name), megamoe_jit.MegaMoeError) for name in own)
    assert issubclass(megamoe_jit.ConfigError, ValueError)


def test_import_brings_neither_torch_nor_cuda():
    code = (
        "import sys, json\n"
        "before = set(sys.modules)\n"  # a .pth file may have made the namespace package `cuda`
        "import megamoe_jit, megamoe_jit._cli\n"
        "megamoe_jit.KernelSpec, megamoe_jit.ConfigError, dir(megamoe_jit)\n"
        "heavy = ('torch', 'cuda', 'numpy', 'matplotlib')\n"
        "print(json.dumps([m for m in set(sys.modules) - before if m.split('.')[0] in heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
