"""What ranks measured of a case, as rows: of several ranks the largest figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megamoe_jit._bench.documents import BaselineRow, Row
from megamoe_jit._bench.unfused_run import baseline_rows, fastest
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._spec import MoEShape, WeightFormat

Part = Mapping[str, Any]  #: what one rank measured


def rows_of(case: Scenario, kernels: Mapping[str, str], parts: Sequence[Part]) -> tuple[list[Row], list[BaselineRow]]:
    """The rows of one case, and those of the unfused layer.

    Args:
        case: all ranks' experts, one rank's tokens.
        kernels: which kernel ran for each variant.
        parts: of each rank: `times` of the calls, of those with staging ("auto staged") and, of several ranks, of those
            on one ("one auto"), in microseconds; `verdicts`, a list for each variant, as plain data; `sustained` times
            by variant; `expert_rows`, how many of its rows go to each expert; `baselines`, what is known of each
            method.
    """
    ranks, shape = len(parts), case.shape
    own = MoEShape(shape.hidden, shape.intermediate, shape.experts // ranks, shape.topk)
    others = baseline_rows(case.name, own, case.tokens, ranks, parts)
    rows: list[Row] = []
    for variant, kernel in kernels.items():
        found = {**_figures(own, case, variant, parts), "shape": case.name, "kernel": kernel}
        found |= fastest(others, found["median_us"])
        rows.append(Row(**found, **(_beside_one(variant, parts) if ranks > 1 else {})))
    return rows, others


def _largest(parts: Sequence[Part], name: str, figure: Callable[[Sequence[float]], float]) -> float:
    """Of the times of a call."""
    return max(figure(part["times"][name]) for part in parts)


def _figures(own: MoEShape, case: Scenario, variant: str, parts: Sequence[Part]) -> dict[str, Any]:
    """What rows of one rank and of several have in common; `own` has one rank's experts."""
    median = _largest(parts, variant, statistics.median)
    verdicts = [verdict for part in parts for verdict in part["verdicts"][variant]]
    flops = 6.0 * case.tokens * own.topk * own.hidden * own.intermediate
    stored = WeightFormat.parse(case.weights)
    weight_bytes = touched_experts(own.experts, parts) * stored.expert_code_bytes(own.hidden, own.intermediate)
    return {
        **own.to_json(),
        "tokens": case.tokens,
        "variant": variant,
        "weights": case.weights,
        "median_us": median,
        "min_us": _largest(parts, variant, min),
        "max_us": _largest(parts, variant, max),
        "sustained_us": max(part["sustained"][variant] for part in parts),
        "staged_us": _largest(parts, f"{variant} staged", statistics.median),
        "diff": max(verdict["diff"] for verdict in verdicts),
        "worst_row_diff": max(verdict["worst_row_diff"] for verdict in verdicts),
        "correct": all(verdict["passed"] for verdict in verdicts),
        "tflops": flops * 1e-6 / median,
        "weights_tb_s": weight_bytes * 1e-6 / median,
    }


def touched_experts(own: int, parts: Sequence[Part]) -> int:
    """Experts, of its `own`, that the rank reads which reads most: those that the tokens of any rank go to."""
    rows: list[int] = [sum(each) for each in zip(*(part["expert_rows"] for part in parts), strict=True)]
    return max(sum(count > 0 for count in rows[first : first + own]) for first in range(0, len(rows), own))


def _beside_one(variant: str, parts: Sequence[Part]) -> dict[str, Any]:
    """What rows of several ranks have beside that."""
    medians = [statistics.median(part["times"][variant]) for part in parts]
    one = _largest(parts, f"one {variant}", statistics.median)
    return {"ranks": len(parts), "rank_medians_us": medians, "one_rank_us": one, "vs_one_rank": max(medians) / one}
