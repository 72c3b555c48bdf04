"""What the benchmarks have in common: arguments, the GPU they need, rows as they come, and the document of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.checkout import commit
from megamoe_jit._bench.conditions import environment, write
from megamoe_jit._bench.measure import cases, require_hopper
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._errors import UnsupportedDeviceError
from megamoe_jit._spec import FP8, MAX_RANKS, MoEShape
from megamoe_jit.heuristics.presets import Preset, preset

L = TypeVar("L")


@dataclass(frozen=True)
class Asked:
    """What to measure on which device, and where to write it."""

    presets: list[Preset]
    tokens: list[int]
    output: Path | None
    device: torch.device
    ranks: int
    options: argparse.Namespace  #: all there are, those of the program's own among them


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """For a module of this docstring."""
    return argparse.ArgumentParser(description=(doc or "").splitlines()[0])


def hopper(arguments: argparse.ArgumentParser) -> torch.device:
    """The current GPU; the program ends with 3 where it is no Hopper."""
    try:
        return require_hopper()
    except UnsupportedDeviceError as error:
        arguments.exit(3, f"Error: {error}\n")


def asked(
    arguments: argparse.ArgumentParser, shapes: Sequence[str], tokens: Sequence[int], *, ranks: int | None = None
) -> Asked:
    """What the command line says; ends the program with 2 where that is nonsense.

    Args:
        arguments: has the options that are the program's own.
        shapes: by default, as are `tokens`.
        tokens: counts.
        ranks: by default, of a program that measures on several; None for one that does not.
    """
    arguments.add_argument("--shapes", default=",".join(shapes))
    arguments.add_argument("--tokens", default=",".join(map(str, tokens)))
    arguments.add_argument("--output", type=Path, help="write the rows as JSON")
    if ranks is not None:
        arguments.add_argument(
            "--ranks", type=int, default=ranks, choices=range(1, MAX_RANKS + 1), help="GPUs of this host"
        )
    options = arguments.parse_args()
    try:
        presets = [preset(name) for name in options.shapes.split(",")]
        counts = sorted(int(count) for count in options.tokens.split(","))
    except ValueError as error:
        arguments.error(str(error))
    several = getattr(options, "ranks", 1)
    # of several ranks each asks for itself: this process needs no CUDA context
    device = hopper(arguments) if several == 1 else torch.device("cuda")
    return Asked(presets, counts, options.output, device, several, options)


def rows_by_shape(
    presets: Sequence[Preset],
    tokens: Sequence[int],
    make: Callable[[MoEShape, int], AbstractContextManager[L]],
    measure: Callable[[Scenario, L], dict[str, Any]],
    line: Callable[[Mapping[str, Any]], str],
    weights: str = FP8.name,
) -> list[dict[str, Any]]:
    """A row for each shape and token count, printed as it is measured.

    Args:
        presets: Of each, one GPU's slice.
        tokens: Token counts.
        make: What is measured, of a shape and for at most so many tokens; let go of before the next.
        measure: One case of it.
        line: A row as text.
        weights: The format of the weights.
    """
    rows = []
    for each in presets:
        work = cases([each], tokens, weights)
        with make(work[0].shape, max(tokens)) as layer:
            for case in work:
                rows.append(measure(case, layer))
                say(line(rows[-1]))
        del layer
        torch.cuda.empty_cache()
    return rows


def keep(kind: str, output: Path | None, conditions: Mapping[str, Any] | None = None, **parts: Any) -> None:
    """Write a document with these parts, if it is wanted; of `conditions` that others had, with the commit."""
    if output is not None:
        known = environment(commit()) if conditions is None else {**conditions, "commit": commit()}
        write({"schema_version": 1, "kind": kind, "environment": known, **parts}, output)
