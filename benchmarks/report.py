"""Puts the newest results into the documents, between their marks, with two plots of each card.

    python -m benchmarks.report            # writes docs/performance.md, docs/expert-parallel.md, README.md
    python -m benchmarks.report --check    # exit code 1 if their tables are not of these results; writes nothing

Of each card the newest documents of `megamoe-jit bench`, floor.py and from_bf16.py (report_bf16.py) in
benchmarks/results count, of each row of several ranks the newest there is (report_ranks.py), and so of each model
inside transformers (report_models.py).  Documents of shapes that have no goals are left out.  Everything in the tables
and plots follows from the documents and benchmarks/targets.json; needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, report_bf16, report_models, report_others, report_ranks
from benchmarks.checkout import ROOT
from benchmarks.markdown import conditions, documents_of, put, table
from megamoe_jit._cli._io import cell

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
DOCUMENT, PARALLEL, README = DOCS / "performance.md", DOCS / "expert-parallel.md", ROOT / "README.md"
RANKS = (1, 2, 4, 8)  #: of documents of from_bf16.py
README_TOKENS = (16, 64, 512, 1024, 8192)  #: rows of the README's table
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
    card = goals.load().card(device)
    if card is None:
        raise ValueError(f"benchmarks/targets.json knows no card {device!r}")
    return card.name.lower()


def newest(kind: str, ranks: int = 1, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The newest document of this kind and number of ranks for each card, in the order of the cards' names."""
    found = {}
    for doc in documents_of(kind, folder):
        if doc["environment"].get("ranks", 1) != ranks:
            continue
        if kind == "bench" and not any(row["best_known_us"] for row in doc["rows"]):  # shapes without goals
            continue
        found[card_of(doc)] = doc
    return dict(sorted(found.items()))


def _goal(row: Mapping[str, Any]) -> str:
    """The goals met, by the normalised time where there is one."""
    time = row["normalised_us"] or row["median_us"]
    met = [goal for goal in ("must", "aim") if row[f"{goal}_us"] and time <= row[f"{goal}_us"]]
    return "wrong" if not row["correct"] else met[-1] if met else "-"


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    time = row["normalised_us"] or row["median_us"]
    best, limit = row["best_known_us"], row["limit_us"]
    return (
        row["shape"],
        str(row["tokens"]),
        row["kernel"],
        cell(row["median_us"], ".0f"),
        cell(row["normalised_us"], ".0f"),
        cell(best, ".0f"),
        cell(best / time if best else None, ".2f"),
        cell(limit, ".0f"),
        cell(100 * limit / time if limit else None, ".0f", " %"),
        row["bound"] or "-",
        _goal(row),
    )


def _sentences(doc: Mapping[str, Any], variant: str) -> list[str]:
    said = []
    for part in doc["summary"]:
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
    choice = doc["choice"]
    if choice:
        said.append(
            f"The automatic choice is within 3 % of the best forced variant on {choice['close']} of {choice['rows']} "
            f"rows; worst: {choice['worst']:.3f} times its time ({choice['shape']}, {choice['tokens']} tokens)."
        )
    return said


def _against_verified(rows: Sequence[Mapping[str, Any]], variant: str) -> str:
    """The same ratio to the kernels whose output was verified: some of the best known times are of one that was not."""
    others_us = {(t["shape"], t["tokens_per_gpu"]): t["measured_1gpu_us"] for t in goals.load().rows}
    others: list[tuple[Mapping[str, Any], float]] = []
    unverified = 0
    for row in rows:
        known = others_us.get((row["shape"], row["tokens"]), {})
        verified = [us for name, us in known.items() if "not verified" not in name]
        if row["variant"] == variant and verified:
            others.append((row, min(verified)))
            unverified += min(known.values()) < min(verified)
    means = ", ".join(
        f"{statistics.geometric_mean(us / row[key] for row, us in others):.3f} {basis}"
        for basis, key in (("measured", "median_us"), ("normalised", "normalised_us"))
    )
    return (
        f"{unverified} of the {len(others)} best known times are of a kernel with output not verified at one rank. "
        f"Against the others alone: {means}."
    )


def text_of(doc: Mapping[str, Any]) -> str:
    """The Markdown of one document: conditions, sentences, table."""
    doc = goals.judged(doc)
    anchors, rows = doc["anchors"], doc["rows"]
    variant = "auto" if any(row["variant"] == "auto" for row in rows) else rows[0]["variant"]
    dense = [anchor[goals.DENSE] for anchor in anchors]
    read = [anchor[goals.READ] for anchor in anchors]
    measured = (
        f"{conditions(doc['environment'], power=True)} "
        f"Anchors: dense FP8 {min(dense):.0f} to {max(dense):.0f} TFLOPS, read {min(read):.2f} to {max(read):.2f} TB/s."
    )
    lines = [measured, "", *_sentences(doc, variant), ""]
    lines += table(HEAD, [_line(row) for row in rows if row["variant"] == variant])
    if all(row["normalised_us"] for row in rows):  # the targets' kernels were measured on this kind of card
        lines.insert(4, _against_verified(rows, variant))  # after both geometric means
    return "\n".join(lines)


def readme_table(docs: Mapping[str, Mapping[str, Any]]) -> str:
    """Some rows of both cards side by side, and what the cards gave."""
    cards = ("h200", "h100")
    docs = {card: goals.judged(docs[card]) for card in cards}
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for card in cards:
        for row in docs[card]["rows"]:
            if row["variant"] == "auto" and row["tokens"] in README_TOKENS and row["best_known_us"]:
                found.setdefault((row["shape"], row["tokens"]), {})[card] = row
    head = ("layer (an eighth of its experts)", "tokens", "H200, µs", "normalised", "best known", "ratio")
    cells = []
    for (shape, tokens), rows in found.items():
        h200, h100 = (rows[card] for card in cards)
        own, best = h200["normalised_us"], h200["best_known_us"]
        left = f"{h200['median_us']:.0f}", f"{own:.0f}", f"{best:.0f}", f"{best / own:.2f}"
        own, best = h100["median_us"], h100["best_known_us"]
        cells.append((shape, str(tokens), *left, f"{own:.0f}", f"{best:.0f}", f"{best / own:.2f}"))
    lines = table((*head, "H100, µs", "best known", "ratio"), cells)
    for card in cards:
        env, dense = docs[card]["environment"], [anchor[goals.DENSE] for anchor in docs[card]["anchors"]]
        parts = {part["basis"]: part for part in docs[card]["summary"] if part["variant"] == "auto"}
        means = ", ".join(f"{part['faster']:.2f} {basis}" for basis, part in parts.items() if part["faster"])
        lines += [
            "",
            f"{env['device']}: {means} times as fast as the best known (geometric mean of all rows); driver "
            f"{env['driver']}, CUDA {env['cuda']}, dense FP8 8192³ through cuBLAS {min(dense):.0f} to {max(dense):.0f} "
            f"TFLOPS, {env['date'][:10]}.",
        ]
    return "\n".join(lines)


def floor_table(docs: Mapping[str, Mapping[str, Any]]) -> str:
    """The layer's time over that of the slower of its parts alone, and which that is: weights or products."""
    tokens = sorted({row["tokens"] for doc in docs.values() for row in doc["rows"]})
    cells = []
    for doc in docs.values():
        found: dict[str, dict[int, str]] = {}
        for row in doc["rows"]:
            slower = "w" if row["weights_us"] > row["products_us"] else "p"
            found.setdefault(row["shape"], {})[row["tokens"]] = f"{row['of_slower_part']:.2f} {slower}"
        name = card_of(doc).upper()
        cells += [(name, shape, *(by_tokens.get(t, "-") for t in tokens)) for shape, by_tokens in found.items()]
    return "\n".join(table(("card", "layer", *map(str, tokens)), cells))


def documents(docs: Mapping[str, Mapping[str, Any]]) -> dict[Path, str]:
    """What each document should be."""
    texts = {path: path.read_text(encoding="utf-8") for path in (DOCUMENT, PARALLEL, README)}
    for card, doc in docs.items():
        texts[DOCUMENT] = put(texts[DOCUMENT], card, text_of(doc))
    texts[DOCUMENT] = put(texts[DOCUMENT], "floor", floor_table(newest("floor")))
    called = [doc for ranks in RANKS for doc in newest("from_bf16", ranks).values()]
    models = report_models.newest_models(RESULTS)
    beside = list(newest("others").values())
    if called:
        texts[DOCUMENT] = put(texts[DOCUMENT], "from-bf16", report_bf16.full(called))
        texts[README] = put(texts[README], "from-bf16", report_bf16.compact(called))
    if models:
        texts[DOCUMENT] = put(texts[DOCUMENT], "in-transformers", report_models.full(models))
        texts[README] = put(texts[README], "in-transformers", report_models.compact(models))
    if beside:
        texts[DOCUMENT] = put(texts[DOCUMENT], "others", report_others.measured(beside))
    texts[DOCUMENT] = put(texts[DOCUMENT], "published", report_others.published())
    ranks, unfused = report_ranks.rank_rows(RESULTS), report_ranks.rank_rows(RESULTS, unfused=True)
    for name, body in {
        "conditions": report_ranks.conditions(ranks),
        "growth": f"{report_ranks.growth_table(ranks)}\n\n{report_ranks.aims(ranks)}",
        "unfused": report_ranks.unfused_table(unfused),
        "remote": report_ranks.remote_table(RESULTS, "fp8"),
        "packed": report_ranks.remote_table(RESULTS, "mxfp4"),
        "model": report_ranks.model_table(RESULTS),
    }.items():
        if body:
            texts[PARALLEL] = put(texts[PARALLEL], name, body)
    texts[README] = put(texts[README], "one-gpu", readme_table(docs))
    texts[README] = put(texts[README], "ranks", report_ranks.compact_table(ranks, unfused))
    return texts


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    docs = newest("bench")
    texts = documents(docs)
    if options.check:
        return int(any(text != path.read_text(encoding="utf-8") for path, text in texts.items()))
    if importlib.util.find_spec("matplotlib") is None:
        sys.stderr.write("Error: the plots need matplotlib; run: pip install '.[bench]' (or: make env)\n")
        return 3
    from benchmarks.plots import draw

    for card, doc in docs.items():
        draw(doc, DOCS, f"performance-{{}}-{card}.svg")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
