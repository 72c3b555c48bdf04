"""Processes of ranks, forked from one that has imported torch: a rank is there in a tenth of the usual time.

`forked` puts them in the place of new interpreters wherever `run_ranks` starts some.  Everything else is as `run_ranks`
has it, and tests of how it starts, watches and ends processes do without.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.zygote import requests, take_over, zygote

_MODULES = ("torch", "torch.distributed", "numpy", "pytest", "megamoe_jit", "megamoe_jit._check.verify_ranks")


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Ranks that are started in here on the CPU are forked."""
    from megamoe_jit._check import spawn

    names = SimpleNamespace(Popen=_Forked, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    with mock.patch.object(spawn, "subprocess", names):
        yield


class _Forked:
    """What `run_ranks` needs of `subprocess.Popen`."""

    def __init__(self, words: list[str], *, stdin: int, stdout: Any, stderr: int, env: Mapping[str, str], **_: Any):
        python, option, *arguments = words
        assert (python, option, stdin, stderr) == (sys.executable, "-c", subprocess.PIPE, subprocess.STDOUT)
        reader, writer = os.pipe()
        self.stdin, self.returncode = open(writer, "wb", buffering=0), None  # noqa: SIM115 - until the rank is ended
        answers, theirs = socket.socketpair()
        zygote("tests.ranks:serve").send(arguments, env, [reader, stdout.fileno(), stdout.fileno(), theirs.fileno()])
        os.close(reader), theirs.close()
        self._answers = answers.makefile("r")
        self._socket = answers
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The return code, once it has ended."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                self.wait()
        return self.returncode

    def wait(self) -> int:
        """The return code."""
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
            self._answers.close(), self._socket.close()
        return self.returncode


def serve() -> None:
    """Fork for each request a process that says which process is the rank, and how it ended."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.environ["OMP_NUM_THREADS"] = "1"  # ranks are more than cores; and a process with threads is not to be forked
    for name in _MODULES:
        importlib.import_module(name)
    for request, (*streams, answers) in requests(channel):
        if os.fork() == 0:
            channel.close()
            _attend(request, streams, socket.socket(fileno=answers))
            return
        for handle in (*streams, answers):
            os.close(handle)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that attended ranks which have ended
                pass


def _attend(request: dict[str, Any], streams: list[int], answers: socket.socket) -> None:
    pid = os.fork()
    if pid == 0:
        answers.close()
        os.setsid()
        take_over(request, streams)
        sys.path[:] = dict.fromkeys((*os.environ["PYTHONPATH"].split(os.pathsep), *sys.path))
        code, *sys.argv[1:] = request["arguments"]
        exec(code, {"__name__": "__main__"})
        return
    for stream in streams:
        os.close(stream)
    answers.sendall(f"{pid}\n".encode())
    answers.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)
