"""Other ways to do the layer as contenders: which work here, ready to be timed, and what they are in a document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megamoe_jit._bench.clock import TimedCall, captured
from megamoe_jit._bench.contenders import METHODS, Contender
from megamoe_jit._bench.documents import BaselineRow
from megamoe_jit._bench.grouped_gemm import refusal
from megamoe_jit._bench.unfused import Task
from megamoe_jit._layer.group import gather, group_size
from megamoe_jit._spec import MoEShape


def label(method: Contender) -> str:
    """What a method's times are called among those of all contenders."""
    return f"baseline {method.name}"


def unusable(device: torch.device, group: Any = None) -> dict[str, str]:
    """Why each method is not to be timed, empty if it is; all ranks agree.  The last one is, where no other works."""

    def why(method: Contender) -> str:
        return next((reason for reason in gather(group, method.why_not(device, group_size(group))) if reason), "")

    reasons = {method.name: why(method) for method in METHODS[:-1]}
    last = METHODS[-1]
    reasons[last.name] = why(last) if all(reasons.values()) else "not wanted: another method works"
    return reasons


def _attempt(group: Any, action: Callable[[], Any]) -> tuple[Any, str]:
    """Result and nothing, or None and why; all ranks succeed or none does."""
    result, reason = None, ""
    try:
        result = action()
        torch.cuda.synchronize()
    except Exception as error:  # of torch, Triton, NCCL: anything
        reason = refusal(error)
    reasons = [each for each in gather(group, reason) if each]
    return (None, reasons[0]) if reasons else (result, "")


def prepare(
    method: Contender, task: Task, diff: Callable[[torch.Tensor], float]
) -> tuple[TimedCall | None, dict[str, Any]]:
    """What to time, and what is known of it; compiled and captured as far as that works.

    Args:
        method: the way to do it.
        task: what is to be done.
        diff: difference of an output bfloat16 ``[T, H]`` to the reference.
    """
    group = task.group
    facts: dict[str, Any] = {"graph": False, "compiled": method.compiles, "reason": "", "diff": None}

    def build() -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        made = method.build(task, compiled=facts["compiled"])
        return made, made()

    done, reason = _attempt(group, build)
    if done is None and facts["compiled"]:
        facts["compiled"] = False
        done, reason = _attempt(group, build)
    if done is None:
        return None, {**facts, "reason": reason}
    baseline, y = done
    facts["diff"] = max(gather(group, diff(y)))

    def capture() -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        replay = captured(baseline)
        return replay, replay()

    done, _ = _attempt(group, capture)
    if done is None:
        return TimedCall(baseline), facts
    replay, y = done
    return TimedCall(replay), {**facts, "graph": True, "diff": max(facts["diff"], *gather(group, diff(y)))}


def add_baselines(
    calls: dict[str, TimedCall], not_timed: Mapping[str, str], task: Task, diff: Callable[[torch.Tensor], float]
) -> dict[str, dict[str, Any]]:
    """Put the unfused layer among the calls; what is known of each way to do it.

    Args:
        calls: takes those that work, by `label`.
        not_timed: why a method is not to be timed; empty for those that are.
        task, diff: see `prepare`.
    """
    facts: dict[str, dict[str, Any]] = {}
    dynamo: Any = torch
    dynamo._dynamo.reset()  # another case's shapes would count towards its limit of compilations
    for method in METHODS:
        if not not_timed.get(method.name, "not wanted"):
            call, facts[method.name] = prepare(method, task, diff)
            if call is not None:
                calls[label(method)] = call
    return facts


def baseline_rows(
    name: str, shape: MoEShape, tokens: int, ranks: int, parts: Sequence[Mapping[str, Any]]
) -> list[BaselineRow]:
    """Rows of the unfused layer.

    Args:
        name: of the shape.
        shape: with the experts of one rank.
        tokens: of one rank.
        ranks: how many.
        parts: of each rank: `times` by name, and in `baselines` what is known of each method that was prepared.
    """
    found = []
    for method in METHODS:
        facts = parts[0]["baselines"].get(method.name)
        if facts is None:
            continue
        every = [part["times"].get(label(method)) for part in parts]
        median, least, most = (
            None if every[0] is None else max(figure(times) for times in every)
            for figure in (statistics.median, min, max)
        )
        correct = facts["diff"] is not None and facts["diff"] <= method.bound
        found.append(
            BaselineRow(
                shape=name,
                experts=shape.experts,
                tokens=tokens,
                ranks=ranks,
                method=method.name,
                median_us=median,
                min_us=least,
                max_us=most,
                bound=method.bound,
                correct=correct,
                **facts,
            )
        )
    return found


def fastest(rows: Sequence[BaselineRow], median_us: float) -> dict[str, Any]:
    """The fastest unfused method with the right answer, as fields of the row of a call that took `median_us`."""
    best = min((r for r in rows if r.correct and r.median_us), key=lambda r: r.median_us or 0.0, default=None)
    return {
        "baseline": best.method if best else None,
        "baseline_us": best.median_us if best else None,
        "baseline_speedup": best.median_us / median_us if best and best.median_us else None,
    }
