"""A model's layer by its `config.json` alone: what `--shapes PATH` names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megamoe_jit._cli import cli
from megamoe_jit._errors import CheckpointError, ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit.checkpoints.sizes import model_shape

SHAPE = MoEShape(512, 256, 16, 4)
DEEPSEEK = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256} | {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}
MIXTRAL = {"hidden_size": 512, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 4}
LONGCAT = {"hidden_size": 512, "expert_ffn_hidden_size": 256, "n_routed_experts": 16, "moe_topk": 4}


def write(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def invoke(*words: str):
    return CliRunner().invoke(cli, list(words))


@pytest.mark.parametrize("config", [DEEPSEEK, MIXTRAL, LONGCAT, {"vocab_size": 9, "text_config": DEEPSEEK}])
def test_sizes_by_the_names_that_models_give_them(tmp_path: Path, config: dict[str, Any]):
    folder = write(tmp_path / "mine", config)
    assert model_shape(str(folder)) == model_shape(str(folder / "config.json")) == ("mine", SHAPE, "fp8")


@pytest.mark.parametrize("more", [{"expert_dtype": "fp4"}, {"quantization_config": {"quant_method": "mxfp4"}}])
def test_experts_that_are_packed(tmp_path: Path, more: dict[str, Any]):
    folder = write(tmp_path / "v4", DEEPSEEK | more)
    assert model_shape(str(folder)).weight_format == "mxfp4"
    words = "plan", "--tokens", "4", "--shapes", str(folder)
    assert "v4: its experts are mxfp4 on disk" in invoke(*words).stderr
    assert invoke(*words, "--weight-format", "mxfp4").stderr == ""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DEEPSEEK | {"hidden_act": "gelu"}, "its activation is 'gelu'"),
        (DEEPSEEK | {"hidden_size": 2880}, "hidden = 2880"),
        (DEEPSEEK | {"num_experts_per_tok": None}, "a layer of experts needs its topk"),
        (DEEPSEEK | {"moe_intermediate_size": [256, 512]}, "no single number; a layer of experts needs its interm"),
        ({"hidden_size": 512, "intermediate_size": 1024}, "it has no n_routed_experts or num_experts or"),
    ],
)
def test_a_model_that_cannot_be_the_layer(tmp_path: Path, config: dict[str, Any], said: str):
    done = invoke("warmup", "--dry-run", "--shapes", str(write(tmp_path / "mine", config)))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {tmp_path / 'mine' / 'config.json'}: ")
    assert said in done.stderr


def test_models_of_a_hubs_cache_are_called_by_their_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each has its `config.json` as a link to a file that is called by a hash, in a folder of the same name."""
    for name in ("one", "two"):
        snapshot = tmp_path / name / "snapshots" / f"revision-{name}"
        snapshot.mkdir(parents=True)
        write(tmp_path / name / "blobs", DEEPSEEK)
        (snapshot / "config.json").symlink_to("../../blobs/config.json")
        monkeypatch.chdir(snapshot)
        places = str(snapshot), str(snapshot / "config.json"), ".", "config.json"
        assert [model_shape(place).name for place in places] == [f"revision-{name}"] * 4


def test_a_configuration_that_is_not_there_or_cut_short(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json' is not there; allowed: the folder of a model"):
        model_shape(str(tmp_path))
    with pytest.raises(ConfigError, match=r"x\.\.\. is not there; allowed: the folder of a model"):
        model_shape("x" * 5000)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="fetch it again"):
        model_shape(str(tmp_path))


def test_models_and_names_on_one_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "v4-flash", DEEPSEEK)
    write(tmp_path / "mine", DEEPSEEK)
    monkeypatch.chdir(tmp_path)
    found = json.loads(invoke("plan", "--tokens", "4", "--json", "--shapes", "mine,v4-flash").stdout)["plans"]
    assert [(each["name"], each["shape"]["hidden"]) for each in found] == [("mine", 512), ("v4-flash", 4096)]
    twice = invoke("plan", "--tokens", "4", "--shapes", "v4-flash,./v4-flash")
    assert (twice.exit_code, "'v4-flash' is given twice" in twice.stderr) == (2, True)
    assert "or a model's folder or config.json" in invoke("plan", "--tokens", "4", "--shapes", "yours").stderr
