"""Threads and forks of one process: one compile for all, and nobody waits for what will never come."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.registry import registry
from megamoe_jit._jit.runtime import forget, retry, warmup
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from tests.stubs import child_environment

PING = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)


def test_threads_share_one_compile(place, compiles):
    barrier = threading.Barrier(8)
    kernels = []

    def work():
        barrier.wait()
        kernels.append(get_kernel(PING))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiles) == 1
    assert sorted(k.origin for k in kernels) == ["compiled"] + ["memory"] * 7
    assert len({k.cubin for k in kernels}) == 1


def test_thread_that_comes_as_the_kernel_is_done_finds_it_in_memory(place, compiles, monkeypatch):
    """Between its first look and the lock another thread finishes."""

    first = get_kernel(PING)
    kernels = registry()
    life = kernels.life(PING)
    known, life.kernel = life.kernel, None

    class Lock:
        def __enter__(self):
            life.kernel = known

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(kernels, "_lock", Lock())
    again = get_kernel(PING)
    assert (again.origin, again.cubin) == ("memory", first.cubin)
    assert len(compiles) == 1


def test_thread_that_waits_for_an_interrupted_one_compiles_itself(place, monkeypatch):
    """Ctrl-C reaches the main thread alone."""
    real, started, waiting = _obtain.compile_source, threading.Event(), threading.Event()
    calls, found = [], []

    def first_is_interrupted(text, *, kernel_name, toolchain):
        calls.append(kernel_name)
        if len(calls) > 1:
            return real(text, kernel_name=kernel_name, toolchain=toolchain)
        started.set()
        assert waiting.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(_obtain, "compile_source", first_is_interrupted)

    class Future(concurrent.futures.Future):
        def exception(self, timeout=None):
            waiting.set()
            return super().exception(timeout)

    monkeypatch.setattr(concurrent.futures, "Future", Future)

    def wait():
        assert started.wait(20)
        found.append(get_kernel(PING).origin)

    other = threading.Thread(target=wait)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        get_kernel(PING)
    other.join(20)
    assert found == ["compiled"]


def in_a_child(action: Callable[[], object]) -> int:
    """The exit status of a forked child that does this: 0, 1 if it raises, else the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20)  # ends a child that waits for a thread it has not
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def test_child_of_a_fork_compiles_what_a_thread_of_its_parent_was_compiling(place, monkeypatch):
    real, started, go_on = _obtain.compile_source, threading.Event(), threading.Event()
    parent = os.getpid()

    def slow(text, *, kernel_name, toolchain):
        if os.getpid() == parent:
            started.set()
            assert go_on.wait(20)
        return real(text, kernel_name=kernel_name, toolchain=toolchain)

    monkeypatch.setattr(_obtain, "compile_source", slow)
    thread = threading.Thread(target=get_kernel, args=(PING,))
    with override(lock_timeout_s=0.1):  # the parent has the lock of the kernel on this machine
        thread.start()
        assert started.wait(20)
        status = in_a_child(lambda: get_kernel(PING))
        go_on.set()
        thread.join(20)
    assert status == 0


def locks() -> list[Any]:
    """Every lock that a module of the package keeps, or an object that such a module keeps."""
    modules = [vars(module) for name, module in sys.modules.items() if name.split(".")[0] == "megamoe_jit"]
    kept = [value for space in modules for value in space.values() if hasattr(value, "__dict__")]
    objects = [vars(each) for each in kept if type(each).__module__.startswith("megamoe_jit")]
    found = [value for space in (*modules, *objects) for value in space.values()]
    kinds = (type(threading.Lock()), type(threading.RLock()))
    return list({id(lock): lock for lock in found if isinstance(lock, kinds)}.values())


def test_child_of_a_fork_needs_no_lock_that_a_thread_of_its_parent_held(place):
    """As it was while other threads looked a kernel up, read the settings, searched the compiler."""
    spec = KernelSpec(PING.shape, Variant.COOPERATIVE)
    with contextlib.ExitStack() as held:
        for lock in locks():
            held.enter_context(lock)
        status = in_a_child(lambda: (get_kernel(PING), retry(), forget(), warmup([spec])))
    assert len(locks()) >= 4
    assert status == 0


def test_interrupted_compile_is_neither_remembered_nor_left_running(place, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_obtain, "compile_source", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get_kernel(PING)
    assert registry().life(PING).running is None
    assert get_kernel(PING).origin == "compiled"


BEHIND_THE_END = """
import atexit, threading
from megamoe_jit._jit.runtime import warmup
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
specs = [KernelSpec(MoEShape(256, 128, 8, 2), variant) for variant in (Variant.PINGPONG, Variant.COOPERATIVE)]
def work():
    print([result.kernel.origin for result in warmup(specs)], flush=True)
def behind():
    threading.main_thread().join()
    work()
threading.Thread(target=behind).start()
atexit.register(work)
"""


@pytest.mark.parametrize("before", ["", "import concurrent.futures.thread"])
def test_a_warmup_that_outlives_its_script_is_done_by_its_own_thread(place, before):
    """The interpreter starts no more threads then."""
    command = [sys.executable, "-c", before + BEHIND_THE_END]
    run = subprocess.run(command, env=child_environment(place), capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    assert run.stdout.splitlines() == ["['compiled', 'compiled']", "['memory', 'memory']"]


@pytest.mark.parametrize("none", [{0}, {1}, {0, 1}], ids=["the first", "the second", "any"])
def test_a_warmup_that_cannot_have_all_threads_does_each_kernel_once(place, compiles, monkeypatch, caplog, none):
    """As where a container limits them. A pool that could start no thread keeps the order for one that it has."""
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("megamoe-jit-warmup"):
            started.append(thread)
            if len(started) - 1 in none:
                raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    specs = [KernelSpec(PING.shape, variant) for variant in (Variant.PINGPONG, Variant.COOPERATIVE, Variant.DECODE)]
    assert [result.spec for result in warmup(specs, jobs=2) if result.ok] == specs
    assert sorted(compiles) == sorted(spec.kernel_name for spec in specs)
    assert not caplog.records


def test_interrupted_warmup_without_threads_leaves_the_other_kernels(place, monkeypatch):
    begun = []

    def interrupted(text, *, kernel_name, toolchain):
        begun.append(kernel_name)
        raise KeyboardInterrupt

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_obtain, "compile_source", interrupted)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(KeyboardInterrupt):
        warmup([PING, KernelSpec(PING.shape, Variant.COOPERATIVE)], jobs=2)
    assert len(begun) == 1
