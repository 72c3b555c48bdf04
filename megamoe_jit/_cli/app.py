"""The command group: what every command shares, and how errors become exit codes."""

from __future__ import annotations

import warnings
from typing import Any

import click

from megamoe_jit._cli import bench, cache, demo, env, shapes, verify, warmup
from megamoe_jit._cli._io import ExitCode, say
from megamoe_jit._errors import ConfigError, LoadError, MegaMoeError, ToolchainError, UnsupportedDeviceError
from megamoe_jit._version import __version__

__all__ = ["cli", "main"]

_ENVIRONMENT = (ToolchainError, UnsupportedDeviceError, LoadError)


def _exit_code(error: MegaMoeError) -> ExitCode:
    if isinstance(error, ConfigError):
        return ExitCode.USAGE
    return ExitCode.ENVIRONMENT if isinstance(error, _ENVIRONMENT) else ExitCode.FAILED


class _Group(click.Group):
    """Turns the library's errors into one message on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        # NumPy is optional to torch and not needed here, but torch without it says so at import.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        try:
            return super().invoke(ctx)
        except MegaMoeError as error:
            say(f"error: {error}")
            ctx.exit(_exit_code(error))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "megamoe_jit":
                raise
            say(f"error: this command needs the Python package {error.name!r}, which is not installed")
            ctx.exit(ExitCode.ENVIRONMENT)
        except KeyboardInterrupt:
            say("interrupted")
            ctx.exit(ExitCode.INTERRUPTED)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 fine, 1 something failed, 2 wrong usage, 3 the machine lacks something, 130 interrupted.",
)
@click.version_option(__version__, "--version", prog_name="megamoe-jit")
def cli() -> None:
    """One FP8 Mixture-of-Experts layer as one CUDA kernel for NVIDIA Hopper, compiled on first use.

    Data goes to standard output, everything else to standard error.  Every command takes --json.
    """


for _command in (
    warmup.warmup,
    cache.cache,
    shapes.shapes,
    verify.verify,
    bench.bench,
    demo.demo,
    env.env,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="megamoe-jit")
