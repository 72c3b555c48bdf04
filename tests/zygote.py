"""A process that has imported the command line and is forked for each command a test runs.

A command starts in a tenth of the time that a new interpreter takes, and is otherwise as `python -m megamoe_jit` starts
it: environment, working directory, standard streams and end are its own.  Neither torch nor cuda is imported before the
fork, so whether a command imports them is up to the command.  `tests/ranks.py` has one that did import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "cuda", "matplotlib")
_AT_START = ("PYTHON", "LD_", "LC_", "LANG")  #: variables that an interpreter or the loader reads when it starts


class Zygote:
    """A new one per process that runs tests; it ends with that process.

    Args:
        serve: the function that it runs, as `module:name`.
    """

    def __init__(self, serve: str = "tests.zygote:serve") -> None:
        self._channel, other = socket.socketpair()
        self._lock = threading.Lock()
        self._started_with = _at_start(os.environ)
        with other:
            module, _, name = serve.partition(":")
            code = f"import sys; sys.path.insert(0, {str(REPO)!r}); from {module} import {name}; {name}()"
            words = [sys.executable, "-c", code, str(other.fileno())]
            self._process = subprocess.Popen(words, pass_fds=[other.fileno()])

    def can_run(self, environ: Mapping[str, str]) -> bool:
        """Whether an interpreter would start in this environment as the zygote did."""
        return _at_start(environ) == self._started_with

    def run(self, arguments: list[str], environ: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
        """Run a command to its end.

        Args:
            arguments: of the command line.
            environ: all its environment variables.
            timeout: seconds after which it is killed.

        Returns:
            Its return code, as `subprocess` has it, and what it wrote to standard output and standard error.

        Raises:
            subprocess.TimeoutExpired: it was killed.
        """
        with self._lock, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with open(os.devnull, "rb") as nothing:
                self.send(arguments, environ, [nothing.fileno(), out.fileno(), err.fileno()])
            answers = self._channel.makefile("r")
            pid = int(answers.readline())
            late = threading.Event()
            timer = threading.Timer(timeout, lambda: (late.set(), os.kill(pid, signal.SIGKILL)))
            timer.start()
            code = int(answers.readline())
            timer.cancel()
            out.seek(0), err.seek(0)
            if late.is_set():
                raise subprocess.TimeoutExpired(arguments, timeout, out.read(), err.read())
            return code, out.read().decode(), err.read().decode()

    def send(self, arguments: list[str], environ: Mapping[str, str], handles: list[int]) -> None:
        """Ask for a process; the handles are copied into the one that serves."""
        request = {"arguments": arguments, "environ": dict(environ), "cwd": os.getcwd()}
        socket.send_fds(self._channel, [b"+"], handles)
        self._channel.sendall(json.dumps(request).encode() + b"\n")

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self._process.wait()


@functools.cache
def zygote(serve: str) -> Zygote:
    """The one of this process that runs such a function; it ends with the process."""
    made = Zygote(serve)
    atexit.register(made.close)
    return made


def _at_start(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_AT_START)}


def preload() -> None:
    """Import every module of the package that does without the heavy ones."""
    sys.modules.update(dict.fromkeys(HEAVY))  # who imports one of them fails, and is imported where it is needed
    package = importlib.import_module("megamoe_jit")
    for module in pkgutil.walk_packages(package.__path__, "megamoe_jit.", onerror=lambda _: None):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("jinja2", "rich.console", "rich.live", "rich.table"):
        importlib.import_module(name)
    for name in HEAVY:
        del sys.modules[name]


def requests(channel: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What is asked for, with the handles, until nobody is there to ask."""
    gc.collect()
    gc.freeze()  # a child would otherwise copy what it only counts
    while True:
        _, handles, *_ = socket.recv_fds(channel, 1, 4)
        if not handles:
            return
        yield json.loads(channel.makefile("r").readline()), handles


def serve_with_torch() -> None:
    """`serve` from a process that has torch, for commands that import it anyway."""
    serve(["torch", "numpy"])


def serve(more: Sequence[str] = ()) -> None:
    """Fork for each request, which come through the handle that is the argument; `more` is imported as well."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    preload()
    for name in more:
        importlib.import_module(name)
    answer(channel, become)


def answer(channel: socket.socket, be: Callable[[dict[str, Any], list[int]], None]) -> None:
    """Fork for each request a process that is what is asked for, and say which it is and how it has ended."""
    for request, streams in requests(channel):
        pid = os.fork()
        if pid == 0:
            channel.close()
            be(request, streams)
            return
        for stream in streams:
            os.close(stream)
        channel.sendall(f"{pid}\n".encode())
        channel.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Be `python -m megamoe_jit`: ends with SystemExit, past which the interpreter ends as usual."""
    take_over(request, streams)
    sys.argv = ["-m", *request["arguments"]]
    runpy.run_module("megamoe_jit", run_name="__main__", alter_sys=True)


def take_over(request: dict[str, Any], streams: list[int]) -> None:
    """Have the standard streams, environment and working directory that were asked for."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 - for as long as the process runs
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
