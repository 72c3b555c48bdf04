"""benchmarks/report_models.py: what models inside transformers become in the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import report_models
from tests.unit.benchmarks.environment import ENV

ENV_OF_MODELS = {**ENV, "transformers": "5.17.0"}


def document(model: str, ours: float, date: str = "2026-01-02T00", tokens: int = 16) -> dict[str, Any]:
    times = {"megamoe": ours, "grouped_mm": 6.0, "eager": 30.0}
    row: dict[str, Any] = {"step": "decode", "tokens": tokens}
    for name, ms in times.items():
        row |= {f"{name}_ms": ms, f"{name}_tokens_per_s": 1e3 * tokens / ms}
    diffs = {"logits_diff": {"megamoe": 0.05, "eager": 0.01}, "experts_diff": {"megamoe": 0.001, "eager": 2e-6}}
    part = {"model": model, "layers": 4, **diffs, "rows": [row]}
    return {"kind": "in_transformers", "environment": {**ENV_OF_MODELS, "date": date}, "models": [part]}


def read(folder: Path, *docs: dict[str, Any]) -> dict[str, report_models.Measured]:
    for number, doc in enumerate(docs):
        (folder / f"{number}.json").write_text(json.dumps(doc))
    return report_models.newest_models(folder)


def test_of_each_model_the_newest_document_counts(tmp_path: Path):
    found = read(
        tmp_path,
        document("b", 4.0, "2026-01-03T00"),
        document("b", 5.0, "2026-01-02T00"),
        document("a", 3.0, "2026-01-01T00"),
        {"kind": "from_bf16", "environment": ENV, "rows": []},
    )
    assert [(name, part["rows"][0]["megamoe_ms"]) for name, (part, _) in found.items()] == [("a", 3.0), ("b", 4.0)]


def test_the_compact_table_has_a_line_for_each_model_and_one_for_each_kind_of_run(tmp_path: Path):
    text = report_models.compact(read(tmp_path, document("a", 4.0), document("b", 2.0, tokens=64)))
    assert text.splitlines() == [
        "| layers | decode 16 | decode 64 |",
        "| --- | --- | --- |",
        "| 4 of a | 1.50 | - |",
        "| 4 of b | - | 3.00 |",
        "",
        "NVIDIA H200, driver 580, CUDA 13.0, NVRTC 13.0, torch 2.11, transformers 5.17.0, 2026-01-02, "
        "commit 0123456789ab.",
    ]


def test_the_full_table_has_times_and_how_far_results_differ(tmp_path: Path):
    text = report_models.full(read(tmp_path, document("a", 4.0)))
    assert "| decode 16 | 4.00 | 4000 | 6.00 | 2667 | 30.00 | 533 | 1.50 |" in text
    assert "4 layers of a. From what `grouped_mm` gives, `megamoe` differs by 1.0e-03 and `eager` by 2.0e-06" in text
    assert text.startswith("NVIDIA H200")
    assert not text.endswith("\n")
