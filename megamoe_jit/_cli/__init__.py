"""The command line: `megamoe-jit`, also `python -m megamoe_jit`.

Data goes to standard output, talk to standard error.  Modules here import click and nothing heavy; torch,
cuda and rich are imported inside the commands that need them: `--help` and the listings start at once.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from megamoe_jit._cli.app import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Entry point of the console script; an interrupt while its modules are imported is answered too."""
    try:
        from megamoe_jit._cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def __getattr__(name: str) -> object:
    if name == "cli":
        from megamoe_jit._cli.app import cli

        return cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
