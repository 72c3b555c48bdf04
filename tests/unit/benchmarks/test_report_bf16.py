"""benchmarks/report_bf16.py: what the layer from bf16 to bf16 becomes in the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, report_bf16
from tests.unit.benchmarks.environment import ENV


def row(shape: str, tokens: int, kernel: float, host: float = 20.0, correct: bool = True) -> dict[str, Any]:
    return {
        "shape": shape,
        "tokens": tokens,
        "correct": correct,
        "kernel_us": kernel,
        "kernel_graph_us": kernel + 1,
        "layer_graph_us": kernel + 3,
        "layer_eager_us": kernel + 4,
        "more_us": 2.0,
        "more_percent": 1.5,
        "host_layer_us": host,
        "host_kernel_us": host / 2,
        "host_empty_op_us": 2.1,
    }


def called(*rows: dict[str, Any]) -> dict[str, Any]:
    chain = {"layers": 8, "hidden": 2048, "intermediate": 768, "experts": 16, "topk": 8, "tokens": 8}
    times = {"eager_us": 40.0, "graph_us": 32.0, "eager_over_graph": 1.25}
    memory = {"shape": "v4-flash", "layers": 43, "tokens": 8192, "weights_gib": 33.6, "beside_gib": 0.875}
    return {"kind": "from_bf16", "environment": ENV, "rows": [*rows], "chain": {**chain, **times}, "memory": memory}


def on_ranks(ranks: int, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "from_bf16", "environment": {**ENV, "ranks": ranks}, "rows": [*rows]}


def test_the_compact_table_has_tokens_side_by_side():
    text = report_bf16.compact([called(row("a", 8, 170.0), row("a", 1, 60.0, 22.0), row("b", 8, 180.0))])
    assert text.splitlines()[:8] == [
        "| layer | µs of | 1 | 8 |",
        "| --- | --- | --- | --- |",
        "| a | kernel alone | 60 | 170 |",
        "| a | layer in a CUDA graph | 63 | 173 |",
        "| a | layer, called | 64 | 174 |",
        "| b | kernel alone | - | 180 |",
        "| b | layer in a CUDA graph | - | 183 |",
        "| b | layer, called | - | 184 |",
    ]
    assert "20.0 to 22.0 µs for the layer, 10.0 to 11.0 for the kernel alone" in text
    assert text.endswith("2026-01-02, commit 0123456789ab.")


def test_the_full_table_has_every_figure_and_what_was_measured_once():
    text = report_bf16.full([called(row("a", 1, 60.0), row("a", 8, 170.0, correct=False))])
    assert "| a | 1 | 60.0 | 61.0 | 63.0 | 64.0 | 2.0 | 1.5 | 20.0 | 10.0 | 2.1 | right |" in text
    assert "| a | 8 | 170.0 | 171.0 | 173.0 | 174.0 | 2.0 | 1.5 | 20.0 | 10.0 | 2.1 | wrong |" in text
    assert "40 µs each where they are called, 32 as one graph, 1.25 times as long." in text
    assert "43 layers of v4-flash that serve 8192 tokens hold 0.88 GiB beside 33.6 GiB of weights." in text


def test_several_ranks_have_tables_of_their_own_in_the_full_form_alone():
    docs = [called(row("a", 1, 60.0)), on_ranks(2, row("a", 1, 75.0), {**row("a", 1, 65.0), "weights": "mxfp4"})]
    compact, full = report_bf16.compact(docs), report_bf16.full(docs)
    assert compact == report_bf16.compact(docs[:1])
    assert "| a | kernel alone | 60 |" in compact
    assert "torch 2.11, 2 ranks, 2026-01-02" in full
    assert full.count("µs each where they are called") == 1, "a chain is of one rank"
    assert "| a, MXFP4 | 1 | 65.0 |" in full


@pytest.mark.parametrize("there", [False, True])
def test_sections_are_there_where_documents_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool):
    found = report.newest

    def newest(kind: str, ranks: int = 1) -> dict[str, dict[str, Any]]:
        return found(kind, ranks, tmp_path) if kind == "from_bf16" else found(kind, ranks)

    monkeypatch.setattr(report, "newest", newest)
    if there:
        (tmp_path / "a.json").write_text(json.dumps(called(row("a", 1, 60.0))))
        (tmp_path / "c.json").write_text(json.dumps(on_ranks(2, row("a", 1, 75.0))))
    texts = report.documents(report.newest("bench"))
    if there:
        assert "## From bf16 to bf16\n" in texts[report.DOCUMENT]
        assert "| a | kernel alone | 60 |" in texts[report.README]
        assert "| a | 1 | 75.0 |" in texts[report.DOCUMENT]
    else:
        assert all(texts[path].count("<!-- from-bf16 ") == 2 for path in (report.DOCUMENT, report.README))
