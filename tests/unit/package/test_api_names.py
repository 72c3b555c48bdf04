"""The public face: complete and lazy (`test_upstream_names`: its signatures)."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe_jit
from megamoe_jit import _errors

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
    assert set(names) >= ERRORS


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
