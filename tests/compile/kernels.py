"""Kernels of these tests: compiled once in a run, and looked at when they are, for the log and the PTX are not kept."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from megamoe_jit._compile.nvrtc import CompileResult, compile_source
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.kernel import CompiledKernel
from megamoe_jit._settings.settings import override
from megamoe_jit._spec.compilable import Compilable


def compiled(spec: Compilable) -> CompiledKernel:
    """A kernel that the compiler said nothing about.

    Nothing of it comes from elsewhere: the cache is of these tests alone, shared by the workers of a run.
    """
    cache = Path(os.environ["MEGAMOE_JIT_CACHE_DIR"]) / "compile"
    with override(cache_dir=cache), mock.patch.object(_obtain, "compile_source", _in_silence):
        return _obtain._obtain(spec, force=False, stop=None)


def _in_silence(*arguments: object, **options: object) -> CompileResult:
    """`compile_source`: no advisory, no warning of the front end, no call, no local memory."""
    result = compile_source(*arguments, **options)  # type: ignore[arg-type]
    assert result.diagnostics == ()
    assert "C75" not in result.log
    for word in (".local ", "call.uni", "vprintf", ".extern .func"):
        assert word not in result.ptx
    return result
