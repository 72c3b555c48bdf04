"""Waiting for a GPU whose driver may never answer, with stand-ins for `torch.cuda.synchronize`."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megamoe_jit._device import wait as _device_wait
from megamoe_jit._device.fault import LOST
from megamoe_jit._device.wait import wait_for_device
from tests.stubs import REPO

DEVICE = torch.device("cuda", 3)


class Driver:
    """Its `synchronize` returns once `idle` is set, and raises `error` if there is one."""

    def __init__(self) -> None:
        self.idle = threading.Event()
        self.error: Exception | None = None
        self.asked: list[torch.device] = []

    def synchronize(self, device: torch.device) -> None:
        self.asked.append(device)
        assert self.idle.wait(60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    yield made
    made.idle.set()


def test_an_idle_device_is_waited_for_once_and_without_a_pause(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_device_wait, "LOOK_S", 50.0)
    driver.idle.set()
    begin = time.monotonic()
    assert wait_for_device(DEVICE, lambda: False) is None
    assert time.monotonic() - begin < 20
    assert driver.asked == [DEVICE]


def test_work_without_a_record_is_waited_for_however_long_it_takes(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_device_wait, "LOOK_S", 0.001)
    monkeypatch.setattr(_device_wait, "GRACE_S", 0.001)
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 100:
            driver.idle.set()
        return False

    assert wait_for_device(DEVICE, look) is None
    assert looks >= 100


def test_the_first_line_of_the_error_comes_back(driver: Driver):
    driver.error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    driver.idle.set()
    assert wait_for_device(DEVICE, lambda: True) == "CUDA error: an illegal memory access was encountered"


def test_a_record_gives_the_driver_time_to_report(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_device_wait, "GRACE_S", 60.0)
    driver.error = RuntimeError("reported late")

    def look() -> bool:
        threading.Timer(0.1, driver.idle.set).start()
        return True

    assert wait_for_device(DEVICE, look) == "reported late"


def test_a_record_of_which_the_driver_says_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_device_wait, "GRACE_S", 0.1)
    assert wait_for_device(DEVICE, lambda: True) == LOST


def test_a_wait_for_ever_does_not_keep_the_process_from_ending(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_device_wait, "GRACE_S", 0.1)
    wait_for_device(DEVICE, lambda: True)
    waiting = [t for t in threading.enumerate() if t.name == "megamoe-jit waits for the GPU"]
    assert waiting
    assert all(t.daemon for t in waiting)


def test_an_error_that_is_not_the_drivers_is_not_taken_for_success(driver: Driver):
    driver.error = ValueError("no such device")
    driver.idle.set()
    with pytest.raises(ValueError, match="no such device"):
        wait_for_device(DEVICE, lambda: False)


def test_one_thread_serves_wait_after_wait(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_device_wait, "_idle", [])
    driver.idle.set()
    threads = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: threads.append(threading.get_ident()))
    for _ in range(50):
        assert wait_for_device(DEVICE, lambda: False) is None
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


AT_EXIT = """
import atexit, sys, threading, time, types

cuda = types.SimpleNamespace()
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, device=object)
from megamoe_jit._device import wait as wait

wait.be_ready()
for_ever, wait.GRACE_S = threading.Event(), 0.1
seen = []

def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")

def at_exit():
    threading.Thread.start = refuse
    for synchronize, record in ((lambda _: None, False), (lambda _: None, False), (lambda _: for_ever.wait(), True)):
        cuda.synchronize = synchronize
        seen.append(wait.wait_for_device("cuda:0", lambda: record))
    cuda.synchronize = lambda _: None  # no thread is left: it is waited for all the same
    seen.append(wait.wait_for_device("cuda:0", lambda: False))
    wait.be_ready()
    print(seen)

atexit.register(at_exit)
"""


def test_a_layer_may_be_destroyed_when_the_program_has_ended():
    """Python 3.12 makes no new threads for functions that are registered with `atexit`; here none does."""
    run = [sys.executable, "-c", AT_EXIT]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert ast.literal_eval(done.stdout) == [None, None, LOST, None]


def test_a_forked_child_starts_a_thread_of_its_own(driver: Driver):
    driver.idle.set()
    wait_for_device(DEVICE, lambda: False)
    _device_wait.be_ready()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            os._exit(wait_for_device(DEVICE, lambda: False) is not None)
        finally:
            os._exit(9)
    assert os.waitpid(child, 0) == (child, 0)
