"""Tables of the layer inside models of transformers, for report.py: of each model the newest document there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import conditions, documents_of, table

#: A model's part of a document, and the environment of that.
Measured = tuple[Mapping[str, Any], Mapping[str, Any]]
IMPLEMENTATIONS = ("megamoe", "grouped_mm", "eager")


def newest_models(folder: Path) -> dict[str, Measured]:
    """By model, in the order of their names."""
    docs = documents_of("in_transformers", folder)
    found: dict[str, Measured] = {part["model"]: (part, doc["environment"]) for doc in docs for part in doc["models"]}
    return dict(sorted(found.items()))


def _step(row: Mapping[str, Any]) -> str:
    return f"{row['step']} {row['tokens']}"


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['grouped_mm_ms'] / row['megamoe_ms']:.2f}"


def _rates(row: Mapping[str, Any]) -> Iterator[str]:
    return (f"{row[f'{name}_tokens_per_s']:.0f}" for name in IMPLEMENTATIONS)


def _conditions(models: Mapping[str, Measured]) -> str:
    return "\n".join(sorted({conditions(env) for _, env in models.values()}))


def compact(models: Mapping[str, Measured]) -> str:
    """For the README: of each model, how many times as fast as `grouped_mm` each step is."""
    steps = list(dict.fromkeys(_step(row) for part, _ in models.values() for row in part["rows"]))
    cells = []
    for name, (part, _) in models.items():
        found = {_step(row): _ratio(row) for row in part["rows"]}
        cells.append((f"{part['layers']} of {name}", *(found.get(step, "-") for step in steps)))
    return "\n".join([*table(("layers", *steps), cells), "", _conditions(models)])


def full(models: Mapping[str, Measured]) -> str:
    """For docs/performance.md: times, and how far results are from each other."""
    lines = [_conditions(models), ""]
    head = (
        "step",
        "megamoe, ms",
        "tokens/s",
        "grouped_mm, ms",
        "tokens/s",
        "eager, ms",
        "tokens/s",
        "times grouped_mm",
    )
    for name, (part, _) in models.items():
        cells = []
        for row in part["rows"]:
            times = (f"{row[f'{each}_ms']:.2f}" for each in IMPLEMENTATIONS)
            pairs = (cell for pair in zip(times, _rates(row), strict=True) for cell in pair)
            cells.append((_step(row), *pairs, _ratio(row)))
        lines += [f"{part['layers']} layers of {name}. {_differences(part)}", "", *table(head, cells), ""]
    return "\n".join(lines[:-1])


def _differences(part: Mapping[str, Any]) -> str:
    """Of both from grouped_mm; not every document has that of experts alone."""
    places = (
        ("experts_diff", "in the experts of the worst layer on the same inputs"),
        ("logits_diff", "in the logits"),
    )
    said = (
        f"by {part[name]['megamoe']:.1e} and `eager` by {part[name]['eager']:.1e} {where}"
        for name, where in places
        if name in part
    )
    return f"From what `grouped_mm` gives, `megamoe` differs {', '.join(said)}."
