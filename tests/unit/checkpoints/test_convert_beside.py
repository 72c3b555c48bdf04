"""What `convert` writes beside weights: configurations, wherever they say how a model is quantised, and small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamoe_jit.checkpoints import convert, inspect
from megamoe_jit.checkpoints.files import Files
from tests.checkpoints import V3, Tensor, model

INDEX = "model.safetensors.index.json"
FP8 = {**V3["quantization_config"], "modules_to_not_convert": ["lm_head"]}
TEXT = {"num_experts_per_tok": 2, "num_experts": 4}


@pytest.mark.parametrize("weight_format", ["fp8", "mxfp4", "megamoe"])
def test_a_configuration_says_it_where_the_source_did(tmp_path: Path, weight_format: str):
    text = {**TEXT, "quantization_config": FP8, "expert_dtype": "fp8"}
    config = {"model_type": "qwen3_5_moe", "text_config": text, "quantization_config": None}
    source = model("qwen3.5-moe", config=config)
    convert(source.write(tmp_path / "source"), tmp_path / "made", weight_format, lossy=True)
    made = json.loads((tmp_path / "made/config.json").read_text())
    assert made["quantization_config"] is None
    said = made["text_config"]["quantization_config"]
    assert (said["of"] if weight_format == "megamoe" else said).items() >= FP8.items()
    assert made["text_config"].get("expert_dtype") == ("fp4" if weight_format == "mxfp4" else None)
    assert "expert_dtype" not in made
    assert inspect(tmp_path / "made").usable


def test_a_part_that_says_nothing_is_left_as_it_is(tmp_path: Path):
    config = {"text_config": TEXT, **V3}
    convert(model("qwen3.5-moe", config=config).write(tmp_path / "source"), tmp_path / "made", "fp8")
    made = json.loads((tmp_path / "made/config.json").read_text())
    assert made["text_config"] == TEXT
    assert made["quantization_config"].items() >= V3["quantization_config"].items()


def test_what_a_part_says_can_refuse_too(tmp_path: Path):
    config = {"quantization_config": None, "text_config": {**TEXT, "quantization_config": {"quant_method": "awq"}}}
    found = inspect(model("qwen3.5-moe", config=config).write(tmp_path))
    assert (found.usable, "'awq'" in str(found.problem)) == (False, True)


def test_small_files_go_along_and_other_weights_do_not(tmp_path: Path):
    folder = model("qwen3-moe").write(tmp_path / "source")
    small = {
        "qwen.tiktoken",
        "tokenizer.vocab",
        "LICENSE",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
    }
    others = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", ".gitattributes", "a.partial"}
    for name in small | others:
        (folder / name).write_text("{}")
    convert(folder, tmp_path / "made", "fp8")
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert small <= made
    assert not others & made


def test_what_files_hold_and_the_index_does_not_name_goes_along(tmp_path: Path):
    made = model("qwen3-moe")
    made.tensors["model.norm.weight"] = Tensor("BF16", (256,), bytes(512))
    folder = made.write(tmp_path / "source")
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    convert(folder, tmp_path / "made", "fp8")
    assert "model.norm.weight" in Files(tmp_path / "made")
