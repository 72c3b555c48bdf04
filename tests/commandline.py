"""What the tests of the command line share: processes, terminals, a warm cache, documents held against schemas."""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema

from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._cli import cli
from tests.zygote import Zygote, zygote

SIZES = ["--hidden", "256", "--intermediate", "128", "--experts", "4", "--topk", "1"]
STAGED = [*SIZES, "--inputs", "staged"]  #: of `warmup`: the two kernels that do not stage
PINGPONG = "megamoe_pingpong_h256_i128_e4_k1_r1_fast"
COOPERATIVE = "megamoe_cooperative_h256_i128_e4_k1_r1_fast"
_SESSION = Path(os.environ.get("MEGAMOE_JIT_CACHE_DIR") or tempfile.mkdtemp(prefix="megamoe-jit-warm-"))
SCHEMAS = resources.files("megamoe_jit._cli") / "schemas"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a user starts it; nobody is there to answer.

    It is forked from one that has imported the command line; `start` is slower, and leaves nothing out.
    """
    return _fork(zygote("tests.zygote:serve"), arguments, environ)


def run_with_torch(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`run` of a command that imports torch, forked from a process that has done so."""
    return _fork(zygote("tests.zygote:serve_with_torch"), arguments, environ)


def _fork(zygote: Zygote, arguments: tuple[str, ...], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environ}
    if not zygote.can_run(variables):
        return start(*arguments, **environ)
    code, out, err = zygote.run(list(arguments), variables, timeout=600)
    return subprocess.CompletedProcess(["megamoe-jit", *arguments], code, out, err)


def start(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`run` in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "megamoe_jit", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environ},
    )


def leaf_commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command."""
    if not isinstance(command, click.Group):
        return [path]
    return [leaf for name, sub in command.commands.items() for leaf in leaf_commands(sub, (*path, name))]


def _take_terminal(slave: int) -> None:
    """In the child: the terminal is its own, and Ctrl-C reaches it even where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


class Terminal:
    """A process on a pseudo-terminal of its own, which is its controlling one: Ctrl-C works.

    Args:
        arguments: of the command line.
        environ: more environment variables; TERM is `xterm` unless given.
        rows: height of the terminal.
        stdout: where standard output goes, if not to the terminal.
    """

    def __init__(self, *arguments: str, rows: int = 40, stdout: Any = None, **environ: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megamoe_jit", *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env={**env, "TERM": "xterm", **environ},
            start_new_session=True,
            preexec_fn=functools.partial(_take_terminal, slave),
        )
        os.close(slave)
        self.output = ""

    def read_until(self, ready: Callable[[str], bool], seconds: float = 120) -> None:
        """Read until `ready(output)`, or the end of the output."""
        limit = time.monotonic() + seconds
        while not ready(self.output):
            assert time.monotonic() < limit, f"nothing came in time; so far:\n{self.output}"
            if not select.select([self._master], [], [], 1)[0]:
                continue
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            self.output += data.decode(errors="replace")

    def type(self, text: str) -> None:
        """What a user types; \\x03 is Ctrl-C."""
        os.write(self._master, text.encode())

    def wait(self) -> int:
        """Read to the end; the exit code."""
        self.read_until(lambda _: False)
        code = self._process.wait(timeout=60)
        os.close(self._master)
        return code


@functools.cache
def _warm() -> Path:
    root = _SESSION / "warm"  # of all workers: whoever comes second finds the kernels there
    done = run("warmup", *STAGED, "--cache-dir", str(root))
    assert done.returncode == 0, done.stderr
    return root


def warm_cache(target: Path) -> Path:
    """A cache of its own with the two kernels of `STAGED`."""
    shutil.copytree(_warm(), target)
    return target


def keys_of(root: Path) -> dict[str, str]:
    """Keys of the kernels in a cache, by symbol."""
    return {info.meta["entry"]: info.key for info in KernelCache(root).entries()}


def damage(root: Path, key: str) -> None:
    """Change one byte of a cached kernel."""
    path = root / "v1" / key[:2] / key / "kernel.cubin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def schema(kind: str, closed: bool = True) -> dict[str, Any]:
    """The schema of a document.

    Args:
        kind: its `kind`.
        closed: allow only what the schema names: readers may meet more, but we must not print what is not described.
    """
    found: dict[str, Any] = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    return _closed(copy.deepcopy(found)) if closed else found


def _closed(part: Any) -> Any:
    if isinstance(part, dict):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
        for inner in part.values():
            _closed(inner)
    elif isinstance(part, list):
        for inner in part:
            _closed(inner)
    return part


def checked(text: str) -> dict[str, Any]:
    """The one document a command printed, valid by its schema."""
    doc: dict[str, Any] = json.loads(text, parse_constant=lambda name: 1 / 0)
    jsonschema.Draft202012Validator(schema(doc["kind"])).validate(doc)
    return doc
