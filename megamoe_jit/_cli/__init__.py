"""The command line: `megamoe-jit`, also `python -m megamoe_jit`.

Data goes to standard output, talk to standard error.  Modules here import click and nothing heavy; torch,
cuda and rich are imported inside the commands that need them: `--help` and the listings start at once.
"""

from megamoe_jit._cli.app import cli, main

__all__ = ["cli", "main"]
