"""What measured rows are held against: other kernels, goals, and the speed of the card itself.

A time is normalised by the one figure of the card that bounds the row: times of "weights" rows are multiplied by the
run's read anchor over that of the targets, times of "flops" rows by the run's dense FP8 anchor over that of the
targets.  The run's anchor is the mean of all that were taken in it.  All is pure arithmetic on rows as plain data.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe_jit._bench.derived import add_limits, choice_quality, ratio

READ, DENSE = "read_4gib_tb_s", "dense_fp8_8192_tflops"
TARGETS = Path(__file__).with_name("targets.json")


@dataclass(frozen=True, slots=True)
class Card:
    """What is known for one kind of GPU, as `targets.json` describes it."""

    name: str  #: occurs in the device's name, such as "H200"
    anchors: Mapping[str, float]  #: of the run in which the figures of other kernels were measured; may be empty
    best: str  #: field with the best known time
    must: str  #: field with the time to reach
    aim: str | None


@dataclass(frozen=True, slots=True)
class Known:
    """The content of `targets.json`."""

    rows: tuple[Mapping[str, Any], ...]
    cards: tuple[Card, ...]
    few: Mapping[str, Any]  #: the counts below the table: `shapes`, `tokens`, `aim_over_limit_us`

    def card(self, device: str) -> Card | None:
        """The card that a device is."""
        return next((card for card in self.cards if card.name in device), None)


def load() -> Known:
    """Read `targets.json`."""
    data = json.loads(TARGETS.read_text(encoding="utf-8"))
    cards = tuple(Card(name, c["anchors"] or {}, c["best"], c["must"], c["aim"]) for name, c in data["cards"].items())
    return Known(tuple(data["rows"]), cards, data["few_tokens"])


def _target(row: Mapping[str, Any], known: Known) -> Mapping[str, Any]:
    same = {"experts": "experts_per_gpu", "tokens": "tokens_per_gpu"}
    keys = ("shape", "hidden", "intermediate", "topk", "experts", "tokens")
    return next((t for t in known.rows if all(t[same.get(key, key)] == row[key] for key in keys)), {})


def _goals(row: Mapping[str, Any], card: Card | None, known: Known) -> dict[str, Any]:
    """Limit and goals of a row that has its card's limit."""
    if card is None:
        return dict.fromkeys(("limit_us", "best_known_us", "must_us", "aim_us"))
    if row.get("weights", "fp8") != "fp8":  # the table is of FP8
        return {"limit_us": row["limit_us"], **dict.fromkeys(("best_known_us", "must_us", "aim_us"))}
    target, few, limit_us = _target(row, known), known.few, row["limit_us"]
    if card.aim is not None:  # the card of the table, whose limits are written there too
        limit_us = target.get("limit_us", limit_us)
    aim_us = target.get(card.aim) if card.aim else None
    if not target and card.aim and row["shape"] in few["shapes"] and row["tokens"] in few["tokens"]:
        aim_us = limit_us + few["aim_over_limit_us"]
    return {
        "limit_us": limit_us,
        "best_known_us": target.get(card.best),
        "must_us": target.get(card.must),
        "aim_us": aim_us,
    }


def annotate(
    rows: Sequence[Mapping[str, Any]], device: str, anchors: Sequence[Mapping[str, float]], known: Known
) -> list[dict[str, Any]]:
    """Rows with their limits and goals, and the same times as the card of the targets would have given.

    Args:
        rows: as `bench` measures them; figures that an earlier call added are replaced.
        device: name of the GPU.
        anchors: taken in the same run.
        known: what to hold the rows against.

    Returns:
        Copies with `bound`, `limit_us`, `best_known_us`, `must_us`, `aim_us`; `vs_best_known`, `vs_limit` and
        `limit_share` (1 is the limit) of the time as measured; `normalised_us` and, of that, `normalised_vs_best_known`
        and `normalised_limit_share`.  What is not known is None.
    """
    card = known.card(device)
    scale: dict[str | None, float] = {}
    for bound, key in (("weights", READ), ("flops", DENSE)):
        taken = [anchor[key] for anchor in anchors if key in anchor]
        if card is not None and key in card.anchors and taken:
            scale[bound] = statistics.fmean(taken) / card.anchors[key]
    found = []
    for row in add_limits(rows, device):
        goals, time = _goals(row, card, known), row["median_us"]
        factor = scale.get(row["bound"])
        normal = None if factor is None else time * factor
        found.append(
            {
                **row,
                **goals,
                "vs_best_known": ratio(time, goals["best_known_us"]),
                "vs_limit": ratio(time, goals["limit_us"]),
                "limit_share": ratio(goals["limit_us"], time),
                "normalised_us": normal,
                "normalised_vs_best_known": ratio(normal, goals["best_known_us"]),
                "normalised_limit_share": ratio(goals["limit_us"], normal),
            }
        )
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How annotated rows stand, for each variant, as measured and normalised; wrong rows reach no goal.

    Returns:
        For each: `variant`, `basis` ("measured" or "normalised"), `rows` that have a best known time, `faster`
        (geometric mean of best known over time: above 1 is faster), `must_met`, `aim_rows`, `aim_met`, and of the token
        counts below the table `few_rows` and `few_met`.
    """
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for basis, key in (("measured", "median_us"), ("normalised", "normalised_us")):
            mine = [r for r in rows if r["variant"] == variant and r[key] is not None]
            table = [r for r in mine if r["best_known_us"]]
            few = [r for r in mine if r["aim_us"] and not r["best_known_us"]]
            if not table and not few:
                continue

            def met(some: list[Mapping[str, Any]], goal: str, key: str = key) -> int:
                return sum(bool(r["correct"] and r[goal] and r[key] <= r[goal]) for r in some)

            ratios = [r["best_known_us"] / r[key] for r in table if r["correct"]]
            found.append(
                {
                    "variant": variant,
                    "basis": basis,
                    "rows": len(table),
                    "faster": math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None,
                    "must_met": met(table, "must_us"),
                    "aim_rows": sum(bool(r["aim_us"]) for r in table),
                    "aim_met": met(table, "aim_us"),
                    "few_rows": len(few),
                    "few_met": met(few, "aim_us"),
                }
            )
    return found


def judged(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A document of `bench` with its rows held against what is known, and the summary of that."""
    rows = annotate(doc["rows"], doc["environment"]["device"], doc["anchors"], load())
    return {**doc, "rows": rows, "summary": summarise(rows), "choice": choice_quality(rows)}
