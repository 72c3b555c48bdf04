"""What several ranks measured, as rows: the largest figure over ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megamoe_jit._bench.documents import RankRow
from megamoe_jit._bench.unfused_run import baseline_rows, fastest
from megamoe_jit._check.scenarios import Scenario
from megamoe_jit._spec import MoEShape, WeightFormat

__all__ = ["RankRow", "merge"]


def merge(
    case: Scenario, ranks: int, kernels: Mapping[str, str], parts: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of one case, from what each rank measured.

    Args:
        case: all ranks' experts.
        ranks: how many.
        kernels: which kernel ran for each variant.
        parts: of each rank: times and verdicts by name, sustained times, what is known of the baselines.
    """

    def over_ranks(name: str, figure: Callable[[list[float]], float]) -> list[float]:
        return [figure(part["times"][name]) for part in parts]

    shape = MoEShape(case.shape.hidden, case.shape.intermediate, case.shape.experts // ranks, case.shape.topk)
    others = baseline_rows(case.name, shape, case.tokens, ranks, parts)
    rows = []
    flops = 6.0 * case.tokens * shape.topk * shape.hidden * shape.intermediate
    touched = max(part["touched"] for part in parts) / ranks
    weight_bytes = touched * WeightFormat.parse(case.weights).expert_code_bytes(shape.hidden, shape.intermediate)
    for variant, kernel in kernels.items():
        name = f"ranks {variant}"
        medians = over_ranks(name, statistics.median)
        median, one = max(medians), max(over_ranks(f"one {variant}", statistics.median))
        verdicts = [part["verdicts"][which] for part in parts for which in (name, f"one {variant}")]
        rows.append(
            RankRow(
                shape=case.name,
                hidden=shape.hidden,
                intermediate=shape.intermediate,
                experts=shape.experts,
                topk=shape.topk,
                tokens=case.tokens,
                variant=variant,
                kernel=kernel,
                weights=case.weights,
                median_us=median,
                min_us=max(over_ranks(name, min)),
                max_us=max(over_ranks(name, max)),
                sustained_us=max(part["sustained"][variant] for part in parts),
                staged_us=max(over_ranks(f"{name} staged", statistics.median)),
                diff=max(v["diff"] for v in verdicts),
                worst_row_diff=max(v["worst_row_diff"] for v in verdicts),
                correct=all(v["passed"] for v in verdicts),
                tflops=flops * 1e-6 / median,
                weights_tb_s=weight_bytes * 1e-6 / median,
                ranks=ranks,
                rank_medians_us=medians,
                one_rank_us=one,
                vs_one_rank=median / one,
                **fastest(others, median),
            )
        )
    return {"rows": [row.to_json() for row in rows], "baselines": [asdict(o) for o in others]}
