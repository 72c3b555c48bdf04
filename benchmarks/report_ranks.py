"""What several ranks cost against one, as tables.

A row of R ranks has the time of all ranks and, from the same process, that of the same code on one GPU with the same
slice of the layer.  What is more, in µs and %, is taken within a row; times of two documents are only put side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.markdown import documents_of, table

Row = Mapping[str, Any]
Rows = Sequence[Row]

FEW_TOKENS, MANY_TOKENS = 64, 512
#: By ranks: µs more than one rank at most, up to `FEW_TOKENS`; and per cent, from `MANY_TOKENS` on.
AIMS = {2: (8, 4), 4: (12, 6), 8: (15, 8)}
MODEL_TOKENS = (64, 512, 1024, 8192)  #: rows of the model's table
MEETINGS_US = 5.0  #: what two meetings of the ranks take where no row is remote, as measured on two


def _documents(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Of several ranks, the newest last."""
    return [doc for doc in documents_of(kind, folder) if doc["environment"].get("ranks", 1) > 1]


def _as_bench(row: Row) -> dict[str, Any]:
    """A row of `benchmarks.ranks` with the fields of one of `bench`, which routes uniformly."""
    return {
        "shape": row["shape"],
        "tokens": row["tokens"],
        "ranks": row["ranks"],
        "variant": "auto",
        "one_rank_us": row["one_us"],
        "median_us": row["uniform_us"],
        "baseline_us": None,
    }


def rank_rows(folder: Path, unfused: bool = False) -> list[dict[str, Any]]:
    """The newest row of each layer, token count and number of ranks, of FP8, in the order of the documents.

    Args:
        folder: of documents of `bench` and of `benchmarks.ranks`.
        unfused: rows beside the unfused layer alone.  Otherwise these count only where there are no others: contenders
            that take turns warm the card up for each other.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    docs = [(doc["environment"], doc["rows"]) for doc in _documents(folder, "bench")]
    for doc in _documents(folder, "ranks"):
        docs.append((doc["environment"], [_as_bench(row) for row in doc["rows"] if row["weights"] == "fp8"]))
    for environment, rows in sorted(docs, key=lambda doc: str(doc[0]["date"])):
        for row in rows:
            key = row["ranks"], row["shape"], row["tokens"]
            if row["variant"] != "auto" or (unfused and not row["baseline_us"]):
                continue
            if unfused or not row["baseline_us"] or key not in found or found[key]["baseline_us"]:
                found[key] = {**row, "environment": environment}
    return [found[key] for key in sorted(found)]


def conditions(rows: Rows) -> str:
    """Where and when the rows were measured, each once."""
    said: dict[str, set[int]] = {}
    for row in rows:
        said.setdefault(markdown.conditions(row["environment"], power=True, ranks=False), set()).add(row["ranks"])
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
        us, percent = AIMS[ranks]
        reached = _reached([(row["tokens"], *_more(row)) for row in of_ranks.values()], ranks)
        said.append(
            f"The aim on {ranks} ranks is {us} µs more at most up to {FEW_TOKENS} tokens and {percent} % from "
            f"{MANY_TOKENS} on, reached by {reached}."
        )
    return " ".join(said)


def _reached(more: Sequence[tuple[int, float, float]], ranks: int) -> str:
    """Of rows by tokens, µs and per cent more, how many are within the aim."""
    most_us, most_percent = AIMS[ranks]
    few = [us <= most_us for tokens, us, _ in more if tokens <= FEW_TOKENS]
    many = [percent <= most_percent for tokens, _, percent in more if tokens >= MANY_TOKENS]
    return f"{sum(few)} of {len(few)} and {sum(many)} of {len(many)} rows"


_REMOTE = {"half": "half remote", "all": "all remote", "uniform": "routed at random"}


def _adds(times: Row, mode: str) -> tuple[float, float]:
    """What a mode of `benchmarks.ranks` adds to one rank: µs, %."""
    us = times[f"{mode}_us"] - times["one_us"]
    return us, 100 * us / times["one_us"]


def _remote_rows(folder: Path, weights: str) -> list[dict[str, Any]]:
    """Of the newest document of `benchmarks.ranks` that has rows of such weights."""
    by_document = ([row for row in doc["rows"] if row["weights"] == weights] for doc in _documents(folder, "ranks"))
    return next((rows for rows in reversed(list(by_document)) if rows), [])


def remote_table(folder: Path, weights: str) -> str:
    """What is more by how many rows are remote; of the newest document of `benchmarks.ranks`.

    Args:
        folder: of documents.
        weights: the format; where no document has rows of it, the table is empty.
    """
    rows = _remote_rows(folder, weights)
    if not rows:
        return ""
    cells = []
    for row in rows:
        adds = (_adds(row, mode) for mode in _REMOTE)
        more = (f"{us:+.0f} µs, {percent:+.1f} %" for us, percent in adds)
        cells.append((row["shape"], str(row["tokens"]), f"{row['one_us']:.0f}", *more))
    reached = []
    for mode, what in _REMOTE.items():
        found = [(row["tokens"], *_adds(row, mode)) for row in rows]
        reached.append(f"{what} {_reached(found, rows[0]['ranks'])}")
    head = ("layer", "tokens", "one rank, µs", *_REMOTE.values())
    return "\n".join([*table(head, cells), "", f"Within the aim are: {'; '.join(reached)}."])


def _modelled(row: Row, ranks: int) -> str:
    """What so many ranks add to one: the meetings, and `a * s + b * s * s` of the share `s` of rows that are remote."""
    measured, share = (row["ranks"] - 1) / row["ranks"], (ranks - 1) / ranks
    half, everything = (_adds(row, mode)[0] - MEETINGS_US for mode in ("half", "all"))
    b = (half - measured * everything) / (measured * measured - measured)
    us = MEETINGS_US + (everything - b) * share + b * share * share
    return f"{us:+.0f} µs" if row["tokens"] <= FEW_TOKENS else f"{100 * us / row['one_us']:+.1f} %"


def model_table(folder: Path) -> str:
    """The model of the cost by number of ranks, through the newest rows of `benchmarks.ranks`; empty without any."""
    rows = [row for row in _remote_rows(folder, "fp8") if row["tokens"] in MODEL_TOKENS]
    cells = [(r["shape"], str(r["tokens"]), *(_modelled(r, ranks) for ranks in AIMS)) for r in rows]
    head = ("layer", "tokens", *(f"{ranks} ranks" for ranks in AIMS))
    return "\n".join(table(head, cells)) if rows else ""


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
