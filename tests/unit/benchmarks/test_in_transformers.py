"""benchmarks/in_transformers.py: a tiny model of transformers on the CPU, with the reference in the layer's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import megamoe_jit as mm
from benchmarks import in_transformers as lab
from megamoe_jit.reference import moe_reference
from tests.unit.bench.test_measure import CONDITIONS

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
}


class Layer(torch.nn.Module):
    """`MegaMoE` by the reference; its outputs are multiplied with `factor`."""

    factor = 1.0
    tokens: list[int] = []  # noqa: RUF012  of all calls

    def __init__(self, l1, l2, *, topk, max_tokens):
        super().__init__()
        self.weights, self.topk, self.max_tokens = (l1, l2), topk, max_tokens

    def forward(self, x, topk_idx, topk_weights):
        assert topk_idx.shape == (x.shape[0], self.topk)
        assert x.shape[0] <= self.max_tokens
        self.tokens.append(x.shape[0])
        return moe_reference(*mm.quantize_activations(x), topk_idx, topk_weights.float(), *self.weights) * self.factor


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    for owner, name, value in (
        (lab, "BATCHES", (1, 3)),
        (lab, "PROMPT", 2),
        (lab, "STEPS", 2),
        (lab, "PREFILL", 5),
        (lab, "ROUNDS", 1),
        (lab, "SKIPPED", 0),
        (Layer, "tokens", []),
        (torch.cuda, "synchronize", lambda: None),
    ):
        monkeypatch.setattr(owner, name, value)
    made = lab.make_model(torch.device("cpu"), **SIZES)
    assert lab.adopt(made, 2, 8, Layer) == 2
    return made


def test_all_have_the_same_weights_and_take_turns(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    found = lab.differences(model, 3)
    assert 0 < found["megamoe"] < 1e-3
    assert found["eager"] < 1e-5
    Layer.tokens.clear()
    rows = list(lab.measure(model))
    assert [(row["step"], row["tokens"]) for row in rows] == [("decode", 1), ("decode", 3), ("prefill", 5)]
    assert Layer.tokens == [count for calls in ((2, 1, 1), (6, 3, 3), (5,)) for count in calls for _ in range(2)]
    assert all(row[f"{name}_ms"] > 0 for row in rows for name in lab.IMPLEMENTATIONS)
    monkeypatch.setattr(Layer, "factor", 2.0)
    assert lab.differences(model, 3)["megamoe"] > found["megamoe"]


@pytest.mark.parametrize("most", [1.0, 0.0])
def test_the_document(model, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture, most: float):
    for name, value in (
        ("hopper", lambda _: torch.device("cpu")),
        ("make_model", lambda device: model),
        ("adopt", lambda *_: 2),
        ("environment", lambda commit: {**CONDITIONS, "commit": commit}),
        ("MOST_DIFF", most),
    ):
        monkeypatch.setattr(lab, name, value)
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["in_transformers.py", "--output", str(output)])
    assert lab.main() == (most == 0.0), "logits that are too far"
    assert capsys.readouterr().out.splitlines()[-1].startswith("prefill")
    doc = json.loads(output.read_text())
    assert (doc["kind"], doc["layers"], len(doc["rows"])) == ("in_transformers", 2, 3)
    assert doc["environment"]["transformers"]


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["in_transformers.py"])
    with pytest.raises(SystemExit) as stop:
        lab.main()
    assert stop.value.code == 3
    assert "pip install 'transformers" in capsys.readouterr().err
