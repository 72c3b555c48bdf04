"""`megamoe-jit completion`: the script that makes a shell complete commands, shapes and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import click

from megamoe_jit._cli._io import copy_out, emit, json_option
from megamoe_jit._cli.app import COMPLETE_VARIABLE
from megamoe_jit._documents import Document


@dataclass(frozen=True, slots=True)
class Completion(Document):
    """A completion script."""

    KIND = "completion"

    shell: Literal["bash", "zsh", "fish"]
    script: str


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, shell: Literal["bash", "zsh", "fish"], as_json: bool) -> None:
    """Print a completion script for a shell.

    \b
    bash  eval "$(megamoe-jit completion bash)"        in ~/.bashrc
    zsh   eval "$(megamoe-jit completion zsh)"         in ~/.zshrc
    fish  megamoe-jit completion fish | source         in ~/.config/fish/config.fish
    """
    from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

    kind: type[ShellComplete] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    # not its source(), which runs bash to see its version: the script is the same
    script = ShellComplete.source(kind(context.find_root().command, {}, "megamoe-jit", COMPLETE_VARIABLE))
    if as_json:
        emit(Completion(shell, script))
    else:
        copy_out(script, nl=True)
