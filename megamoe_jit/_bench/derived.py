"""What follows from measured rows and the card alone: the least time of each row, and how good the choice was.

The limit of a row is the larger of two times: the touched weights over the card's read bandwidth, and the FLOPs over
the rate of an exact block-scaled main loop.  `bound` says which it is: "weights" or "flops".  All is pure arithmetic on
rows as plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamoe_jit._spec import FP8, WeightFormat
from megamoe_jit._spec.variants import AUTO

CLOSE = 1.03  #: the automatic choice counts as good within this factor of the best forced variant

#: Fields of a row that only a comparison with other kernels fills; empty until then.
COMPARED = (
    *("best_known_us", "vs_best_known", "must_us", "aim_us"),
    *("normalised_us", "normalised_vs_best_known", "normalised_limit_share"),
)


@dataclass(frozen=True, slots=True)
class Card:
    """What one kind of GPU was measured to give."""

    name: str  #: occurs in the device's name, such as "H200"
    weights_tb_s: float  #: reading
    main_loop_tflops: float  #: of an exact FP8 block-scaled main loop


#: The bandwidths are read anchors of runs; the H100's main loop is taken as the H200's: as many SMs, as many watts.
CARDS = (Card("H200", 4.45, 1400.0), Card("H100", 3.09, 1400.0))


def card_of(device: str) -> Card | None:
    """The card that a device is, by its name."""
    return next((card for card in CARDS if card.name in device), None)


def expected_experts(experts: int, topk: int, tokens: int) -> float:
    """Experts that are touched on average when every token takes `topk` different ones at random."""
    return experts * (1.0 - (1.0 - topk / experts) ** tokens)


def limit(row: Mapping[str, Any], card: Card) -> tuple[str, float]:
    """What bounds a row on a card, "weights" or "flops", and the least time in microseconds."""
    ranks, stored = row.get("ranks") or 1, WeightFormat.parse(row.get("weights", FP8.name))
    touched = expected_experts(ranks * row["experts"], row["topk"], ranks * row["tokens"]) / ranks
    weights_us = touched * stored.expert_code_bytes(row["hidden"], row["intermediate"]) * 1e-6 / card.weights_tb_s
    size = row["hidden"] * row["intermediate"]
    flops_us = 6.0 * row["tokens"] * row["topk"] * size * 1e-6 / card.main_loop_tflops
    return ("weights", weights_us) if weights_us >= flops_us else ("flops", flops_us)


def ratio(over: float | None, under: float | None) -> float | None:
    """One over the other; None where one is missing."""
    return over / under if over is not None and under else None


def add_limits(rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Copies of rows with `bound`, `limit_us`, `vs_limit` and `limit_share` (1 is the limit), and `COMPARED` empty.

    Args:
        rows: as `bench` measures them.
        device: name of the GPU; of one that is no `Card` the limit is None.
    """
    card, found = card_of(device), []
    for row in rows:
        bound, least = (None, None) if card is None else limit(row, card)
        share = {"vs_limit": ratio(row["median_us"], least), "limit_share": ratio(least, row["median_us"])}
        found.append({**row, "bound": bound, "limit_us": least, **share, **dict.fromkeys(COMPARED)})
    return found


def choice_quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How the automatic choice compares with the best forced variant; None if the rows do not hold both.

    Returns:
        `rows` compared, how many are `close` (within 3 %), and the `worst` ratio with its `shape` and `tokens`.
    """
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:  # of one format of weights
        cells.setdefault((row["shape"], row["tokens"]), {})[row["variant"]] = row["median_us"]
    ratios = [
        (times[AUTO] / min(time for name, time in times.items() if name != AUTO), where)
        for where, times in cells.items()
        if AUTO in times and len(times) > 1
    ]
    if not ratios:
        return None
    worst, (shape, tokens) = max(ratios)
    close = sum(ratio <= CLOSE for ratio, _ in ratios)
    return {"rows": len(ratios), "close": close, "worst": worst, "shape": shape, "tokens": tokens}
