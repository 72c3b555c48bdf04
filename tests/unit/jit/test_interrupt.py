"""Ctrl-C: while another process's lock is waited for, while NVRTC is at work, and before anything has begun."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from megamoe_jit._cache.cache import user_cache
from megamoe_jit._cache.locks import key_lock
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.runtime import warmup
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._spec.formats import FP8
from tests.stubs import REPO

SPECS = [KernelSpec(MoEShape(256, 128, 8, 2), variant) for variant in Variant.reading(FP8)]


@pytest.fixture(autouse=True)
def ctrl_c(monkeypatch):
    """Interrupts the main thread once an event is set; also where the tests were started without Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def when() -> threading.Event:
        event = threading.Event()
        send = lambda: event.wait(30) and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        threading.Thread(target=send, daemon=True).start()
        return event

    yield when
    signal.signal(signal.SIGINT, before)


def test_while_a_lock_is_waited_for(place, compiles, ctrl_c, monkeypatch):
    """Nothing is compiled: that would be when the lock could not be had in time."""
    interrupt = ctrl_c()
    asked = user_cache().__class__.holds
    monkeypatch.setattr("megamoe_jit._cache.cache.KernelCache.holds", lambda *a: interrupt.set() or asked(*a))
    held = key_lock(Wanted.of(SPECS[0]).key, "held by another")
    with override(lock_timeout_s=50), held, pytest.raises(KeyboardInterrupt):
        warmup(SPECS[:1])
    assert compiles == []
    assert warmup(SPECS[:1])[0].ok, "the lock can be had again"


def test_while_nvrtc_is_at_work(place, ctrl_c, monkeypatch, caplog):
    """It is said at once what is waited for; that is kept and reported, and the rest is not begun."""
    interrupt, said, real, begun = ctrl_c(), threading.Event(), _obtain.compile_source, []

    def compile_source(text, *, kernel_name, toolchain):
        begun.append(kernel_name)
        interrupt.set()
        assert said.wait(20), "nothing is said while the compiler is at work"
        return real(text, kernel_name=kernel_name, toolchain=toolchain)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "interrupted; waiting for what is being compiled" in record.getMessage():
                assert SPECS[0].kernel_name in record.getMessage()
                said.set()

    monkeypatch.setattr(_obtain, "compile_source", compile_source)
    handler, results = Listener(), []
    logging.getLogger("megamoe_jit").addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            warmup(SPECS, jobs=1, progress=results.append)
    finally:
        logging.getLogger("megamoe_jit").removeHandler(handler)
    assert begun == [SPECS[0].kernel_name]
    assert [(result.spec, result.ok) for result in results] == [(SPECS[0], True)]
    assert user_cache().holds(Wanted.of(SPECS[0]).key)
    assert not user_cache().holds(Wanted.of(SPECS[1]).key)


@pytest.mark.parametrize("handing", [0, 1], ids=["it", "the next one"])
def test_while_kernels_are_still_handed_out(place, monkeypatch, handing: int):
    """The first one is at work already: it is kept and reported, as after an interruption that comes later."""
    real, results = concurrent.futures.ThreadPoolExecutor.submit, []
    begun, compiled, handed = threading.Event(), _obtain.compile_source, []

    def compile_source(text, **named):
        begun.set()
        return compiled(text, **named)

    def submit(self, *work):
        if not handed:
            handed.append(real(self, *work))
            if handing == 1:
                return handed[0]
        assert begun.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(_obtain, "compile_source", compile_source)
    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        warmup(SPECS, jobs=1, progress=results.append)
    assert [(result.spec, result.ok) for result in results] == [(SPECS[0], True)]


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    head = f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
    return subprocess.run([sys.executable, *flags, "-c", head + code], capture_output=True, text=True, timeout=60)


def test_while_modules_are_imported():
    code = (
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from megamoe_jit._cli import main\n"
        "main()\n"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_package_itself_imports_next_to_nothing():
    """What is imported before `main` can answer an interrupt: the shorter, the better."""
    code = (
        "before = set(sys.modules)\nimport megamoe_jit._cli\n"
        "print(*sorted(n for n in set(sys.modules) - before if not n.startswith('importlib')))"
    )
    done = python(code, "-I", "-S")
    ours = {"megamoe_jit", "megamoe_jit._cli", "megamoe_jit._version"}
    assert ours <= set(done.stdout.split()) <= ours | {"__future__", "warnings", "_warnings", "_imp", "_weakrefset"}


def test_an_interrupted_process_leaves_at_once():
    """A thread that still compiles does not hold it: that is what a second Ctrl-C asks for."""
    code = (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(50,)).start()\n"
        "from megamoe_jit._cli import app\n"
        "def interrupted(*_, **__): print('said'); raise KeyboardInterrupt\n"
        "app.cli = interrupted\n"
        "app.main()\n"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "said\n", "")
