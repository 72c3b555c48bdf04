"""Puts the newest results of each card into docs/performance.md: tables between its marks, and two plots beside it.

    python benchmarks/report.py                         # the newest file of each card in benchmarks/results
    python benchmarks/report.py some.json other.json    # these documents of `megamoe-jit bench --output`
    python benchmarks/report.py --check                 # exit code 1 if the tables are not of these; writes nothing

Everything in the tables and plots follows from the documents and benchmarks/targets.json; needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamoe_jit import _bench_known

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
DOCUMENT = DOCS / "performance.md"
HEAD = (
    "layer",
    "tokens",
    "kernel",
    "µs",
    "normalised",
    "best known",
    "faster",
    "limit",
    "of limit",
    "bound by",
    "goal",
)


def card_of(doc: Mapping[str, Any]) -> str:
    """Short name of the document's card, such as `h200`; raises `ValueError` if targets.json does not know it."""
    device = doc["environment"]["device"]
    card = _bench_known.load().card(device)
    if card is None:
        raise ValueError(f"benchmarks/targets.json knows no card {device!r}")
    return card.name.lower()


def newest(folder: Path = RESULTS) -> dict[str, Path]:
    """The newest document of each card, by the date inside."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        doc = json.loads(path.read_text(encoding="utf-8"))
        if doc.get("kind") != "bench" or doc["environment"].get("ranks", 1) > 1:
            continue
        dated = doc["environment"]["date"], path
        name = card_of(doc)
        found[name] = max(found.get(name, dated), dated)
    return {name: path for name, (_, path) in found.items()}


def _goal(row: Mapping[str, Any]) -> str:
    """The goals met, by the normalised time where there is one."""
    time = row["normalised_us"] or row["median_us"]
    met = [goal for goal in ("must", "aim") if row[f"{goal}_us"] and time <= row[f"{goal}_us"]]
    return "wrong" if not row["correct"] else met[-1] if met else "-"


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    def figure(value: float | None, digits: int = 0, unit: str = "") -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    time = row["normalised_us"] or row["median_us"]
    best, limit = row["best_known_us"], row["limit_us"]
    return (
        row["shape"],
        str(row["tokens"]),
        row["kernel"],
        figure(row["median_us"]),
        figure(row["normalised_us"]),
        figure(best),
        figure(best / time if best else None, 2),
        figure(limit),
        figure(100 * limit / time if limit else None, 0, " %"),
        row["bound"] or "-",
        _goal(row),
    )


def _sentences(rows: Sequence[Mapping[str, Any]], variant: str) -> list[str]:
    said = []
    for part in _bench_known.summarise(rows):
        if part["variant"] != variant:
            continue
        words = []
        if part["faster"]:
            words.append(
                f"{part['faster']:.3f} times as fast as the best known kernel (geometric mean over {part['rows']} "
                f"rows), {part['must_met']} of {part['rows']} rows reach `must`"
            )
        if part["aim_rows"]:
            words.append(f"{part['aim_met']} of {part['aim_rows']} `aim`")
        if part["few_rows"]:
            words.append(f"below the table {part['few_met']} of {part['few_rows']} reach the limit + 40 µs")
        said.append(f"{part['basis'].capitalize()}: {'; '.join(words)}.")
    choice = _bench_known.choice_quality(rows)
    if choice:
        said.append(
            f"The automatic choice is within 3 % of the best forced variant on {choice['close']} of {choice['rows']} "
            f"rows; worst: {choice['worst']:.3f} times its time ({choice['shape']}, {choice['tokens']} tokens)."
        )
    return said


def text_of(doc: Mapping[str, Any]) -> str:
    """The Markdown of one document: conditions, sentences, table."""
    env, anchors = doc["environment"], doc["anchors"]
    rows = _bench_known.annotate(doc["rows"], env["device"], anchors, _bench_known.load())
    variant = "auto" if any(row["variant"] == "auto" for row in rows) else rows[0]["variant"]
    dense = [anchor[_bench_known.DENSE] for anchor in anchors]
    read = [anchor[_bench_known.READ] for anchor in anchors]
    conditions = (
        f"{env['device']}, power limit {env.get('power_limit_w', '?')} W, driver {env['driver']}, "
        f"CUDA {env.get('cuda')}, NVRTC {env['nvrtc']}, torch {env.get('torch')}, "
        f"{env['date'][:10]}, commit {env['commit']}. "
        f"Anchors: dense FP8 {min(dense):.0f} to {max(dense):.0f} TFLOPS, read {min(read):.2f} to {max(read):.2f} TB/s."
    )
    lines = [conditions, "", *_sentences(rows, variant), "", _row(HEAD), _row(["---"] * len(HEAD))]
    lines += [_row(_line(row)) for row in rows if row["variant"] == variant]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put(text: str, name: str, body: str) -> str:
    """`text` with `body` between the marks of `name`; raises `ValueError` if it has no such marks."""
    begin, end = f"<!-- {name} begin: written by benchmarks/report.py -->", f"<!-- {name} end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{DOCUMENT.name} needs one pair of marks: {begin} and {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    docs = [json.loads(path.read_text(encoding="utf-8")) for path in options.files or newest().values()]
    before = text = DOCUMENT.read_text(encoding="utf-8")
    for doc in docs:
        text = put(text, card_of(doc), text_of(doc))
    if options.check:
        return int(text != before)
    from megamoe_jit._bench_plot import draw

    for doc in docs:
        draw(doc, DOCS, prefix="performance-", suffix=f"-{card_of(doc)}")
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
