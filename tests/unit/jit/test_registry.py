"""The registry of kernels: what it knows, under which settings, for how long; and that nothing else there remembers."""

from __future__ import annotations

import ast
import importlib
import os
import threading
from pathlib import Path

import pytest

import megamoe_jit
from megamoe_jit._errors import CompileError, KernelMissingError, LoadError
from megamoe_jit._jit.kernel import CompiledKernel
from megamoe_jit._jit.registry import Registry, registry, reset
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant

PING = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
COOP = KernelSpec(MoEShape(256, 128, 8, 2), Variant.COOPERATIVE)
KERNEL = CompiledKernel(PING, "ab", b"binary", {}, "compiled", 0.0)
PACKAGE = Path(megamoe_jit.__file__).parent


def found() -> CompiledKernel:
    return KERNEL


def not_to_be_asked() -> CompiledKernel:
    pytest.fail("it is known already")


def test_a_kernel_is_got_once_and_then_known():
    kernels = Registry()
    life = kernels.life(PING)
    assert kernels.once(life, found).origin == "compiled"
    assert kernels.once(life, not_to_be_asked).origin == "memory"
    assert kernels.once(life, found, force=True).origin == "compiled"
    kernels.forget(COOP)
    assert kernels.life(PING).kernel is not None
    kernels.forget(PING)
    assert kernels.life(PING).kernel is None


def test_a_life_is_of_a_spec_and_the_settings():
    kernels = Registry()
    kernels.once(kernels.life(PING), found)
    with override(strict="ignore"):
        assert kernels.life(PING).kernel is None
    assert kernels.life(KernelSpec(PING.shape, PING.variant)).kernel is not None, "an equal spec is the same"
    assert kernels.life(COOP).kernel is None


@pytest.mark.parametrize(
    ("error", "remembered"), [(CompileError("no"), True), (KernelMissingError("none"), False), (OSError("odd"), False)]
)
def test_which_failures_are_remembered(error: Exception, remembered: bool):
    """Another process may provide what is missing; what nobody foresaw may not happen again."""
    kernels = Registry()
    life = kernels.life(PING)

    def fail() -> CompiledKernel:
        raise error

    for _ in range(2):
        with pytest.raises(type(error)):
            kernels.once(life, fail)
    if remembered:
        with pytest.raises(type(error)):
            kernels.once(life, not_to_be_asked)
    kernels.retry()
    assert kernels.once(life, found).cubin == b"binary"


def test_refusals_last_until_retry():
    kernels = Registry()
    life = kernels.life(PING)
    life.refused[0] = LoadError("the driver refuses it")
    kernels.distrust(KERNEL.cubin)
    digest = "9a3a45d01531a20e89ac6ae10b0b0beb0492acd7216a368aa062d1a5fecaf9cd"
    kernels.forget()
    assert (set(life.refused), kernels.trusts(digest)) == ({0}, False)
    kernels.retry()
    assert (set(life.refused), kernels.trusts(digest)) == (set(), True)


class Handles:
    """What a room above keeps."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def after_fork(self) -> None:
        self.pid = os.getpid()


def test_a_companion_is_made_once_and_hears_of_a_fork():
    try:
        kept = registry().companion(Handles)
        assert registry().companion(Handles) is kept
        child = os.fork()
        if child == 0:
            os._exit(0 if kept.pid == os.getpid() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert kept.pid == os.getpid()
        reset()
        assert registry().companion(Handles) is not kept
    finally:
        reset()


def test_a_new_registry_knows_nothing():
    try:
        registry().seal()
        registry().note_made("ab")
        assert (registry().sealed, registry().made("ab")) == (True, True)
        reset()
        assert (registry().sealed, registry().made("ab")) == (False, False)
    finally:
        reset()


MUTABLE = (dict, list, set, bytearray, threading.local, type(threading.Lock()), type(threading.RLock()), Registry)
MODULES = [*sorted(path.stem for path in (PACKAGE / "_jit").glob("[!_]*.py")), "load"]


@pytest.mark.parametrize("name", MODULES)
def test_only_the_registry_remembers(name: str):
    room = "_device" if name == "load" else "_jit"
    tree = ast.parse((PACKAGE / room / f"{name}.py").read_text(encoding="utf-8"))
    module = importlib.import_module(f"megamoe_jit.{room}.{name}")
    targets = [
        target
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    bound = {target.id for target in targets if isinstance(target, ast.Name)} - {"__all__"}
    assert {each for each in bound if isinstance(vars(module)[each], MUTABLE)} == (
        {"_current"} if name == "registry" else set()
    )
    rebound = {each for node in ast.walk(tree) if isinstance(node, ast.Global) for each in node.names}
    assert rebound == ({"_current"} if name == "registry" else set())
