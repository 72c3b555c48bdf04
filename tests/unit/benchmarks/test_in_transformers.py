"""benchmarks/in_transformers.py: tiny models of transformers on the CPU, with the plug-in by the reference."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import megamoe_jit.transformers as plugin
from benchmarks import in_transformers as lab
from megamoe_jit.heuristics.presets import preset
from megamoe_jit.transformers.adapter import Adapter
from tests.unit.bench.test_measure import CONDITIONS

pytestmark = pytest.mark.filterwarnings("ignore:experts_implementation=.megamoe. on a CPU")
SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
}
QWEN = "qwen3-30b-a3b"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Short measurements; tokens of all calls of layers."""
    seen: list[int] = []
    real = Adapter.__call__

    def call(self, x, *more):
        seen.append(x.shape[0])
        return real(self, x, *more)

    for owner, name, value in (
        (lab, "BATCHES", (1, 3)),
        (lab, "PROMPT", 2),
        (lab, "STEPS", 2),
        (lab, "PREFILL", 5),
        (lab, "ROUNDS", 1),
        (lab, "SKIPPED", 0),
        (Adapter, "__call__", call),
        (plugin.options, "max_tokens", plugin.options.max_tokens),
        (torch.cuda, "synchronize", lambda: None),
    ):
        monkeypatch.setattr(owner, name, value)
    return seen


@pytest.fixture
def model(calls: list[int]) -> torch.nn.Module:
    made = lab.make_model(QWEN, torch.device("cpu"), 2, **SIZES)
    assert lab.adopt(made) == 2
    return made


def test_all_have_the_same_weights_and_take_turns(model: torch.nn.Module, calls: list[int]):
    found = lab.differences(model, 3)
    for diffs in found.values():
        assert 0 < diffs["megamoe"] < lab.MOST_DIFF
        assert diffs["eager"] < 1e-5
    calls.clear()
    rows = list(lab.measure(model, (1, 3), prefill=True))
    assert [(row["step"], row["tokens"]) for row in rows] == [("decode", 1), ("decode", 3), ("prefill", 5)]
    assert calls == [count for calls in ((2, 1, 1), (6, 3, 3), (5, 5)) for count in calls for _ in range(2)]
    for row in rows:
        for name in lab.IMPLEMENTATIONS:
            assert row[f"{name}_tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row[f"{name}_ms"], rel=0.1)
    assert list(lab.measure(model, (), prefill=False)) == []


@pytest.mark.parametrize("name", sorted(set(lab.MODELS) - {QWEN}))
def test_other_models_are_measured_as_well(name: str, calls: list[int]):
    more = {"n_routed_experts": 16, "num_experts": 16, "hidden_size": 256, "num_key_value_heads": 2}
    model = lab.make_model(name, torch.device("cpu"), 1, **{**SIZES, **more})
    assert lab.adopt(model) == 1
    assert 0 < lab.differences(model, 3)["experts_diff"]["megamoe"] < lab.MOST_DIFF
    with torch.no_grad():
        assert lab.decode_ms(model, 3) > 0


@pytest.mark.parametrize("name", lab.MODELS)
def test_a_model_is_the_one_of_its_preset_with_experts_in_every_layer(name: str):
    model = lab.make_model(name, torch.device("meta"), 4)
    found = [module for module in model.modules() if getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3]
    shape = preset(name).shape
    experts = (shape.experts, 2 * shape.intermediate, shape.hidden)
    assert [tuple(module.gate_up_proj.shape) for module in found] == [experts] * 4
    assert model.config.num_experts_per_tok == shape.topk


@pytest.mark.parametrize("most", [1.0, 0.0])
def test_the_document(model, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture, most: float):
    for name, value in (
        ("hopper", lambda _: torch.device("cpu")),
        ("make_model", lambda *_: model),
        ("environment", lambda: dict(CONDITIONS)),
        ("MOST_DIFF", most),
    ):
        monkeypatch.setattr(lab, name, value)
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["in_transformers.py", "--model", QWEN, "--batch", "3", "--output", str(output)])
    assert lab.main() == (most == 0.0), "logits that are too far"
    assert capsys.readouterr().out.splitlines()[-1].startswith("decode")
    doc = json.loads(output.read_text())
    (found,) = doc["models"]
    assert (doc["kind"], found["model"], found["layers"]) == ("in_transformers", QWEN, 2)
    assert [row["tokens"] for row in found["rows"]] == [3]
    assert doc["environment"]["transformers"]


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["in_transformers.py"])
    with pytest.raises(SystemExit) as stop:
        lab.main()
    assert stop.value.code == 3
    assert "pip install '.[transformers]'" in capsys.readouterr().err
