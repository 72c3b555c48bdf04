"""Threads and forks of one process: one compile for all, and nobody waits for what will never come."""

from __future__ import annotations

import os
import threading

import pytest

from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit import runtime as _runtime
from megamoe_jit._jit.runtime import get_kernel
from megamoe_jit._spec import KernelSpec, MoEShape, Variant

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

    class Memory(dict):
        def get(self, job):
            return None

    first = get_kernel(PING)
    monkeypatch.setattr(_runtime, "_memory", Memory(_runtime._memory))
    again = get_kernel(PING)
    assert (again.origin, again.cubin) == ("memory", first.cubin)
    assert len(compiles) == 1


def test_thread_that_waits_for_an_interrupted_one_compiles_itself(place, monkeypatch):
    """Ctrl-C reaches the main thread alone."""
    real, started, waiting = _obtain.compile_source, threading.Event(), threading.Event()
    calls, found = [], []

    def first_is_interrupted(text, *, entry, toolchain):
        calls.append(entry)
        if len(calls) > 1:
            return real(text, entry=entry, toolchain=toolchain)
        started.set()
        assert waiting.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(_obtain, "compile_source", first_is_interrupted)

    class Future(_runtime.concurrent.futures.Future):
        def exception(self, timeout=None):
            waiting.set()
            return super().exception(timeout)

    monkeypatch.setattr(_runtime.concurrent.futures, "Future", Future)

    def wait():
        assert started.wait(20)
        found.append(get_kernel(PING).origin)

    other = threading.Thread(target=wait)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        get_kernel(PING)
    other.join(20)
    assert found == ["compiled"]


def test_child_of_a_fork_does_not_wait_for_threads_it_has_not(place):
    job = (_runtime.get_settings(), PING)
    _runtime._running[job] = _runtime.concurrent.futures.Future()
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if not _runtime._running else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        _runtime._running.clear()


def test_interrupted_compile_is_neither_remembered_nor_left_running(place, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_obtain, "compile_source", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get_kernel(PING)
    assert not _runtime._running
    assert get_kernel(PING).origin == "compiled"
