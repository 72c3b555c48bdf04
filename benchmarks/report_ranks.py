"""What several ranks cost against one, as tables.

A row of R ranks has the time of all ranks and, from the same process, that of the same code on one GPU with the same
slice of the layer.  What is more, in µs and %, is taken within a row; times of two documents are only put side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

__all__ = ["aims", "compact_table", "conditions", "growth_table", "rank_rows", "rank_table", "unfused_table"]

Row = Mapping[str, Any]
Rows = Sequence[Row]

FEW_TOKENS, AIM_US = 64, 12  #: up to so many tokens several ranks are to need at most so many µs more than one
MANY_TOKENS, AIM_PERCENT = 512, 6  #: from so many on at most so many per cent


def rank_rows(folder: Path, unfused: bool = False) -> list[dict[str, Any]]:
    """The newest row of each layer, token count and number of ranks, in the order of the documents.

    Args:
        folder: of documents of `bench`.
        unfused: rows beside the unfused layer alone.  Otherwise these count only where there are no others: contenders
            that take turns warm the card up for each other.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    docs = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json"))
    several = [doc for doc in docs if doc.get("kind") == "bench" and doc["environment"].get("ranks", 1) > 1]
    for doc in sorted(several, key=lambda doc: doc["environment"]["date"]):
        for row in doc["rows"]:
            key = row["ranks"], row["shape"], row["tokens"]
            if row["variant"] != "auto" or (unfused and not row["baseline_us"]):
                continue
            if unfused or not row["baseline_us"] or key not in found or found[key]["baseline_us"]:
                found[key] = {**row, "environment": doc["environment"]}
    return [found[key] for key in sorted(found)]


def conditions(rows: Rows) -> str:
    """Where and when the rows were measured, each once."""
    said: dict[str, set[int]] = {}
    for row in rows:
        env = row["environment"]
        where = (
            f"{env['device']}, power limit {env.get('power_limit_w', '?')} W, driver {env['driver']}, "
            f"CUDA {env.get('cuda')}, NVRTC {env['nvrtc']}, torch {env.get('torch')}, {env['date'][:10]}, "
            f"commit {env['commit']}."
        )
        said.setdefault(where, set()).add(row["ranks"])
    return "\n".join(f"{' and '.join(map(str, sorted(ranks)))} ranks: {where}" for where, ranks in said.items())


def _more(row: Row) -> tuple[float, float]:
    """What all ranks need more than one: µs, %."""
    us = row["median_us"] - row["one_rank_us"]
    return us, 100 * us / row["one_rank_us"]


def _cells(row: Row | None) -> tuple[str, ...]:
    if row is None:
        return ("-",) * 4
    us, percent = _more(row)
    return f"{row['one_rank_us']:.0f}", f"{row['median_us']:.0f}", f"{us:+.0f}", f"{percent:+.1f}"


def _by_ranks(rows: Rows) -> dict[int, dict[tuple[str, int], Row]]:
    found: dict[int, dict[tuple[str, int], Row]] = {}
    for row in rows:
        found.setdefault(row["ranks"], {})[row["shape"], row["tokens"]] = row
    return dict(sorted(found.items()))


def _head(ranks: int) -> tuple[str, ...]:
    return "one rank, µs", f"{ranks} ranks, µs", "more, µs", "more, %"


def rank_table(rows: Rows) -> str:
    """Every layer and token count: for each number of ranks, one rank beside all."""
    by_ranks = _by_ranks(rows)
    head = ("layer", "tokens", *(name for ranks in by_ranks for name in _head(ranks)))
    keys = dict.fromkeys(key for of_ranks in by_ranks.values() for key in of_ranks)
    cells = [
        (key[0], str(key[1]), *(cell for of_ranks in by_ranks.values() for cell in _cells(of_ranks.get(key))))
        for key in sorted(keys)
    ]
    return "\n".join(table(head, cells))


def growth_table(rows: Rows) -> str:
    """What is more, from the least to the most over the layers, by token count."""

    def span(found: Rows, what: int) -> str:
        figures = sorted(_more(row)[what] for row in found)
        return f"{figures[0]:+.0f} to {figures[-1]:+.0f}" if figures else "-"

    by_ranks = _by_ranks(rows)
    head = ("tokens", *(f"{ranks} ranks, {unit}" for ranks in by_ranks for unit in ("µs", "%")))
    cells = []
    for tokens in sorted({row["tokens"] for row in rows}):
        line = [str(tokens)]
        for of_ranks in by_ranks.values():
            found = [row for (_, count), row in of_ranks.items() if count == tokens]
            line += [span(found, 0), span(found, 1)]
        cells.append(line)
    return "\n".join(table(head, cells))


def aims(rows: Rows) -> str:
    """How many rows of each number of ranks are as close to one rank as they are to be."""
    said = []
    for ranks, of_ranks in _by_ranks(rows).items():
        few = [_more(row)[0] <= AIM_US for row in of_ranks.values() if row["tokens"] <= FEW_TOKENS]
        many = [_more(row)[1] <= AIM_PERCENT for row in of_ranks.values() if row["tokens"] >= MANY_TOKENS]
        said.append(f"{sum(few)} of {len(few)} and {sum(many)} of {len(many)} rows on {ranks} ranks")
    return (
        f"The aim is {AIM_US} µs more at most up to {FEW_TOKENS} tokens and {AIM_PERCENT} % from {MANY_TOKENS} on. "
        f"Reached by {', '.join(said)}."
    )


def _times_faster(row: Row) -> tuple[str, str]:
    return f"{row['baseline_us']:.0f}", f"{row['baseline_us'] / row['median_us']:.2f}"


def unfused_table(rows: Rows) -> str:
    """Beside the layer of public parts, which ran in turn with it."""
    head = ("layer", "tokens", "ranks", "one rank, µs", "all, µs", "more, µs", "more, %", "unfused, µs", "times faster")
    cells = [(r["shape"], str(r["tokens"]), str(r["ranks"]), *_cells(r), *_times_faster(r)) for r in rows]
    return "\n".join(table(head, cells))


def compact_table(rows: Rows, unfused: Rows) -> str:
    """The rows there are beside the unfused layer, for each number of ranks of both."""
    by_ranks, beside = _by_ranks(rows), _by_ranks(unfused)
    names = [(f"{n} ranks, µs", "more, µs", "more, %", *(("times unfused",) if n in beside else ())) for n in by_ranks]
    cells = []
    for key in sorted(dict.fromkeys(key for of_ranks in beside.values() for key in of_ranks)):
        line = [key[0], str(key[1])]
        for ranks, of_ranks in by_ranks.items():
            line += _cells(of_ranks.get(key))[1:]
            if ranks in beside:
                line.append(_times_faster(beside[ranks][key])[1] if key in beside[ranks] else "-")
        cells.append(line)
    return "\n".join(table(("layer", "tokens", *(name for part in names for name in part)), cells))
