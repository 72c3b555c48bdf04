"""All that a process knows of its kernels: what each spec became, what it may do, whom it does not trust.

There is one `Registry` a process, `registry()`, and `reset()` puts a new one in its place, as a new process has. Every
spec has a `Life` for each value of the settings that it was asked for under: compiled, failed, being compiled, refused
by a device. Rooms above keep what they make of kernels in a `Companion`, which goes where the registry goes. Nothing is
found, compiled or loaded here.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

from megamoe_jit._errors import KernelMissingError, LoadError, MegaMoeError
from megamoe_jit._jit.kernel import CompiledKernel
from megamoe_jit._settings.settings import Settings, get_settings
from megamoe_jit._spec.compilable import Compilable


class Companion(Protocol):
    """What another room keeps of the kernels of a registry; made without arguments at its first use."""

    def after_fork(self) -> None:
        """In a forked child, which has none of the threads that its locks may wait for."""


_Companion = TypeVar("_Companion", bound=Companion)


@dataclass(slots=True, eq=False)
class Life:
    """One kernel under one value of the settings.

    Attributes:
        spec: the kernel.
        kernel: its binary, once there is one.
        failure: why there is none, until `Registry.retry` or `Registry.forget`.
        running: what threads wait for while one of them gets it.
        refused: why a device does not take it, by the device's index, until `Registry.retry`.
    """

    spec: Compilable
    kernel: CompiledKernel | None = None
    failure: MegaMoeError | None = None
    running: concurrent.futures.Future[CompiledKernel] | None = None
    refused: dict[int, LoadError] = dataclasses.field(default_factory=dict)


class Registry:
    """The kernels of a process; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lives: dict[tuple[Settings, Compilable], Life] = {}
        self._sealed = False
        self._made: set[str] = set()  #: keys of what this process compiled
        self._distrusted: set[str] = set()  #: digests of binaries: another copy of the same kernel may be good
        self._told: set[Path] = set()
        self._companions: dict[type[Companion], Companion] = {}

    def life(self, spec: Compilable) -> Life:
        """What became of a kernel under the current settings."""
        job = (get_settings(), spec)
        return self._lives.get(job) or self._lives.setdefault(job, Life(spec))

    def once(self, life: Life, get: Callable[[], CompiledKernel], force: bool = False) -> CompiledKernel:
        """The kernel of a life; gets it unless it is known, in one thread for all that ask.

        Args:
            life: from `life`.
            get: finds or makes it.
            force: get it again, whatever is known.

        Raises:
            MegaMoeError: what `get` raises, the same error each time until `retry` or `forget`; but not that the
                kernel is missing, which another process may mend.
        """
        if life.kernel is not None and not force:
            return life.kernel
        begin = time.perf_counter()
        with self._lock:
            if force:
                life.failure = None
            elif life.kernel is not None:  # another thread was faster
                return life.kernel
            if life.failure is not None:
                raise life.failure.with_traceback(None)
            others = life.running
            if others is None:
                mine = life.running = concurrent.futures.Future[CompiledKernel]()
        if others is not None:
            failure = others.exception()
            if failure is not None and not isinstance(failure, Exception):  # that thread was interrupted, this one not
                return self.once(life, get, force)
            return dataclasses.replace(others.result(), origin="memory", seconds=time.perf_counter() - begin)
        try:
            kernel = get()
        except BaseException as error:
            with self._lock:
                if isinstance(error, MegaMoeError) and not isinstance(error, KernelMissingError):
                    life.failure = error
                life.running = None
            mine.set_exception(error)
            raise
        kernel = dataclasses.replace(kernel, seconds=time.perf_counter() - begin)
        with self._lock:
            life.kernel = dataclasses.replace(kernel, origin="memory", seconds=0.0)
            life.running = None
        mine.set_result(kernel)
        return kernel

    def forget(self, spec: Compilable | None = None) -> None:
        """Drop binaries and failures of a kernel, or of all, whatever the settings."""
        with self._lock:
            for life in self._lives.values():
                if spec is None or life.spec == spec:
                    life.kernel = life.failure = None

    def retry(self) -> None:
        """Forget every failure, and what the driver refused."""
        with self._lock:
            for life in self._lives.values():
                life.failure = None
                life.refused.clear()
            self._distrusted.clear()

    def seal(self, sealed: bool = True) -> None:
        """Forbid compiling, or take that back."""
        self._sealed = sealed

    @property
    def sealed(self) -> bool:
        """Whether nothing may be compiled, because of `seal` or of the settings."""
        return self._sealed or get_settings().disable_jit

    def note_made(self, key: str) -> None:
        """This process compiled the kernel of this key: compiling it again gives nothing better."""
        self._made.add(key)

    def made(self, key: str) -> bool:
        """Whether this process compiled it."""
        return key in self._made

    def distrust(self, cubin: bytes) -> None:
        """A driver refuses this binary."""
        self._distrusted.add(hashlib.sha256(cubin).hexdigest())

    def trusts(self, digest: str) -> bool:
        """Whether no driver refused the binary with this sha256."""
        return digest not in self._distrusted

    def first_from(self, entry: Path) -> bool:
        """Whether nothing was taken from this entry yet; asked once for each time."""
        known = entry in self._told
        self._told.add(entry)
        return not known

    def companion(self, kind: type[_Companion]) -> _Companion:
        """What a room above keeps of these kernels."""
        found = self._companions.get(kind)
        if found is None:
            with self._lock:
                found = self._companions.setdefault(kind, kind())
        return cast(_Companion, found)

    def after_fork(self) -> None:
        """In a child: locks of its own, and nothing is running, since it has none of the threads that did."""
        self._lock = threading.Lock()
        for life in self._lives.values():
            life.running = None
        for companion in self._companions.values():
            companion.after_fork()


_current = Registry()
os.register_at_fork(after_in_child=lambda: _current.after_fork())


def registry() -> Registry:
    """The registry of this process."""
    return _current


def reset() -> None:
    """Know as little of kernels as a new process does; what was loaded stays on its devices."""
    global _current
    _current = Registry()
