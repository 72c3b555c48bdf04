"""The command group: what every command shares, and how errors become exit codes."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import os
import re
import sys
import threading
from collections import UserDict
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from megamoe_jit._cli._io import ExitCode, say
from megamoe_jit._errors import (
    CheckpointError,
    ConfigError,
    LoadError,
    MegaMoeError,
    ToolchainError,
    UnsupportedDeviceError,
)
from megamoe_jit._text import printable
from megamoe_jit._version import __version__

COMPLETE_VARIABLE = "_MEGAMOE_JIT_COMPLETE"  #: a shell sets it to ask what a line can go on with
_ENVIRONMENT = (ToolchainError, UnsupportedDeviceError, LoadError)

#: Every command, in the order of the help: module of the same name, first sentence of its help.
SUMMARIES = {
    "warmup": "Compile the kernels of some shapes into the cache; needs no GPU.",
    "doctor": "Check compiler, torch, driver, GPU, cache, locks and tools, with a trial compile; says what to do.",
    "cache": "The compiled kernels on disk.",
    "shapes": "Model shapes known by name.",
    "explain": "Show which kernel a call takes, with which parameters, why, and whether it is cached; needs no GPU.",
    "plan": "Show the device memory of one rank by section, the shared memory by part, and the launch; needs no GPU.",
    "render": "Print the CUDA source of a kernel, all files in one; needs neither GPU nor compiler.",
    "inspect": "Show a compiled kernel from the inside; needs no GPU.",
    "convert": "Write a model's safetensors files with its experts in another format; goes on where it was ended; "
    "needs no GPU.",
    "inspect-checkpoint": "Show what is in a model's checkpoint, whether it can be used, what it takes; needs no GPU.",
    "env": "Show versions, compilers, GPUs, and every setting with its value and source.",
    "demo": "Run a small layer and check it; without a Hopper GPU compile the kernels and check the reference.",
    "verify": "Run scenarios on the GPU and compare with the FP32 reference.",
    "bench": "Time the layer on this GPU, output checked first.",
    "tune": "Measure which variant and parameters are fastest on this GPU, outputs checked first; resumable.",
    "completion": "Print a completion script for a shell.",
}


class _Commands(UserDict[str, Any]):
    """The commands by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.data:
            raise KeyError(name)
        word = name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"megamoe_jit._cli.{word}"), word)
        return command


def _exit_code(error: MegaMoeError) -> ExitCode:
    if isinstance(error, ConfigError):
        return ExitCode.USAGE
    if isinstance(error, CheckpointError):
        return ExitCode.CORRUPTION
    return ExitCode.ENVIRONMENT if isinstance(error, _ENVIRONMENT) else ExitCode.FAILED


class _Closed(io.TextIOBase):
    """Stands in for a standard output that was closed before the process began: whatever writes to it is refused."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "standard output is closed")


def _working_directory_is_there() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _say_refusal(error: OSError) -> None:
    """Print what the operating system refused; nothing is left that would fail again when the interpreter ends."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT and error.filename is None and not _working_directory_is_there():
        reason = "the working directory is not there any more; change to one that is"
    with contextlib.suppress(OSError):  # standard error may be what fails
        say(f"Error: {reason}" if error.filename is None else f"Error: {error.filename}: {reason}")
    for stream in filter(None, (sys.stdout, sys.stderr)):  # there is none where it was closed from the beginning
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _hint(error: click.UsageError) -> str:
    """What somebody meant who named shapes without the option for it."""
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", error.message)
    command = error.ctx.command if error.ctx is not None else None
    if not extra or command is None or not any("--shapes" in parameter.opts for parameter in command.params):
        return ""
    return f"; shapes are named with --shapes: megamoe-jit {command.name} --shapes {extra[1].replace(' ', ',')}"


@contextlib.contextmanager
def _printable_errors() -> Iterator[None]:
    """What click says of an argument holds the argument, which is a file's name as often as not."""
    try:
        yield
    except click.ClickException as error:
        if isinstance(error, click.UsageError):
            vars(error)["message"] += _hint(error)
        vars(error)["message"] = printable(error.message)  # click declares it final
        raise


class AnsweringGroup(click.Group):
    """Turns the library's errors, and the operating system's, into one message on standard error and an exit code."""

    def main(self, *args: Any, **named: Any) -> Any:
        if sys.stdin is None:
            sys.stdin = open(os.devnull)  # noqa: SIM115 - for as long as the process runs
        if sys.stderr is None:  # click would write errors among the data instead
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if sys.stdout is None:  # click would drop what is written
            sys.stdout = _Closed()
        try:
            return super().main(*args, **named)
        except OSError as error:  # a broken pipe has been answered by click
            _say_refusal(error)
            sys.exit(ExitCode.FAILED)

    def make_context(self, *args: Any, **named: Any) -> click.Context:
        with _printable_errors():
            return super().make_context(*args, **named)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _printable_errors():
                return super().invoke(ctx)
        except MegaMoeError as error:
            say(f"Error: {error}")
            ctx.exit(_exit_code(error))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "megamoe_jit":
                raise
            advice = "; run: pip install 'matplotlib>=3.9'" if error.name == "matplotlib" else ""
            say(f"Error: this needs the Python package {error.name!r}, which is not installed{advice}")
            ctx.exit(ExitCode.ENVIRONMENT)
        except (KeyboardInterrupt, click.Abort):  # Ctrl-C; at a question click makes it an Abort
            say("interrupted")
            ctx.exit(ExitCode.INTERRUPTED)


class _Group(AnsweringGroup):
    """Lists the commands without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(
    cls=_Group,
    commands=_Commands(SUMMARIES),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 fine, 1 something failed or was found, 2 wrong usage, 3 the machine lacks something, "
    "4 a cached kernel, a pack or a checkpoint is damaged, 130 interrupted.",
)
@click.version_option(__version__, "--version", prog_name="megamoe-jit")
def cli() -> None:
    """One FP8 Mixture-of-Experts layer as one CUDA kernel for NVIDIA Hopper, compiled on first use.

    Data goes to standard output, everything else to standard error.  Every command takes --json.
    """


def main() -> None:
    """Entry point of the console script."""
    gc.set_threshold(20_000)  # hardly anything that a command makes is garbage before it ends
    try:
        cli(prog_name="megamoe-jit", complete_var=COMPLETE_VARIABLE)
    except KeyboardInterrupt:  # before or after a command; during one the group answers
        _leave()
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:
            _leave()
        raise
    finally:
        gc.freeze()  # nor is it gone through once more on the way out


def _leave() -> NoReturn:
    """End an interrupted process, at once even if a thread of it still compiles: a second Ctrl-C means that.

    A cache takes no harm from that: kernels are published by one rename.
    """
    if threading.active_count() > 1:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.INTERRUPTED)
