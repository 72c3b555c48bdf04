"""What cannot be a layer, and files that are not what they should be: one error each, that says which and why."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megamoe_jit as mm
from megamoe_jit.checkpoints import convert, inspect, load_experts, load_shared_experts
from megamoe_jit.checkpoints.files import Files
from tests.checkpoints import MODELS, V3, Model, Tensor, model, write_file
from tests.stubs import REPO

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{shard + 1:05}-of-00003.safetensors" for shard in range(3)]


def load(folder: Path, layer: int = 1, **how: Any) -> Any:
    return load_experts(folder, layer, device="cpu", **how)


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def int4(bits: int = 4) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


CONFIGS = {
    "INT4, as Kimi K2 Thinking has it": ({"quantization_config": int4()}, r"experts are INT4; .*FP8 release"),
    "INT8": ({"quantization_config": int4(8)}, "experts are INT8"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq' to integers"),
    "unknown method": ({"quantization_config": {"quant_method": "zip"}}, "by 'zip', which is not known"),
    "no table": ({"quantization_config": "fp8"}, "which is no table"),
    "other blocks": ({"quantization_config": {**V3["quantization_config"], "weight_block_size": [1, 32]}}, "blocks of"),
    "gelu": ({"hidden_act": "gelu"}, "activation is 'gelu'"),
    "alpha": ({"swiglu_alpha": 1.702}, "SwiGLU has swiglu_alpha = 1.702"),
    "soft cap": ({"text_config": {"mlp_gate_softcap": 30.0}}, "mlp_gate_softcap = 30.0"),
    "gpt-oss": ({"model_type": "gpt_oss"}, "hidden size 2880"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_cannot_be_this_layer(tmp_path: Path, what: str):
    config, says = CONFIGS[what]
    with pytest.raises(mm.ConfigError, match=says):
        load(Model(config=config).write(tmp_path))


def with_tensors(**more: Tensor) -> Model:
    made = Model().make()
    base = "model.layers.1.mlp.experts.0.gate_proj"
    made.tensors.update({f"{base}.{name}": tensor for name, tensor in more.items()})
    return made


def without(name: str) -> Model:
    made = Model().make()
    del made.tensors[f"model.layers.1.mlp.experts.{name}"]
    return made


BYTES = Tensor("I32", (2,), bytes(8))
TENSORS = {
    "packed codes": (lambda: with_tensors(weight_packed=BYTES), "are packed .INT4 or NVFP4."),
    "qweight": (lambda: with_tensors(qweight=BYTES), "packed integers"),
    "bias": (lambda: with_tensors(bias=BYTES), "have biases"),
    "hidden 2880": (lambda: Model(hidden=2880, intermediate=128, kind="bf16"), "hidden size 2880.*multiples of 128"),
    "dtype": (lambda: with_tensors(weight=Tensor("I64", (128, 256), bytes(8 * 128 * 256))), "is I64"),
    "no scales": (lambda: without("0.gate_proj.weight_scale_inv"), "is F8_E4M3 without scales"),
    "scales of 64": (
        lambda: with_tensors(weight_scale_inv=Tensor("F32", (2, 4), bytes(32))),
        r"scales \(2, 4\); allowed: \(1, 2\), one for 128 x 128",
    ),
    "scales of integers": (lambda: with_tensors(weight_scale_inv=Tensor("I32", (1, 2), bytes(8))), "scales of I32"),
    "three dimensions": (lambda: with_tensors(weight=Tensor("F8_E4M3", (1, 128, 256), bytes(128 * 256))), "has shape"),
    "two kinds": (
        lambda: with_tensors(weight_scale_inv=Tensor("F32", (128, 1), bytes(512))),
        "stored as fp8, fp8-channel; allowed: one kind",
    ),
    "no experts": (lambda: Model(block="dense"), "no experts by the names of any scheme"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_cannot_be_this_layer(tmp_path: Path, what: str):
    make, says = TENSORS[what]
    with pytest.raises(mm.ConfigError, match=says):
        load(make().write(tmp_path))


WRONG = {
    "layer": ({"layer": 7}, "layer 7 has no experts.*allowed: 1 to 2"),
    "no number": ({"layer": "1"}, "layer '1' has no experts"),
    "rank": ({"rank": 2, "ranks": 2}, "rank = 2 of 2"),
    "ranks": ({"ranks": 3}, "rank = 0 of 3 with 4 experts"),
    "format": ({"weight_format": "int4"}, "weight_format = 'int4'; allowed: auto, fp8"),
    "scheme": ({"scheme": "deepseek-v9"}, "unknown scheme"),
    "other scheme": ({"scheme": "mixtral"}, "no experts by the names of scheme mixtral; there are some by deepseek-v3"),
}


@pytest.mark.parametrize("what", WRONG)
def test_arguments_that_are_wrong(tmp_path: Path, what: str):
    how, says = WRONG[what]
    with pytest.raises(mm.ConfigError, match=says):
        load(Model().write(tmp_path), **how)


MISSING = {
    "an expert": (lambda: _model_without_expert(2), "expert 2 of 4 is not there"),
    "the last expert": (lambda: _model_without_expert(3), "has 3 experts; allowed: 4, as config.json says"),
    "a part": (lambda: without("1.up_proj.weight"), "there is no weight of up"),
    "other sizes": (lambda: _other_sizes(), r"allowed: .*as those of the first expert"),
}


def _model_without_expert(expert: int) -> Model:
    made = Model().make()
    made.tensors = {name: each for name, each in made.tensors.items() if f".experts.{expert}." not in name}
    return made


def _other_sizes() -> Model:
    made, other = Model().make(), Model(intermediate=256, seed=1).make()
    name = "model.layers.1.mlp.experts.3.up_proj."
    made.tensors.update({key: each for key, each in other.tensors.items() if key.startswith(name)})
    return made


@pytest.mark.parametrize("what", MISSING)
def test_experts_that_are_not_there(tmp_path: Path, what: str):
    make, says = MISSING[what]
    with pytest.raises(mm.CheckpointError, match=says):
        load(make().write(tmp_path))


DEVICES = {
    "cudaa": (mm.ConfigError, "device = 'cudaa'; allowed: cpu, or cuda"),
    "meta": (mm.ConfigError, "device = 'meta'"),
    "cuda:99": (mm.UnsupportedDeviceError, "cuda:99 is not here.*cpu for weights alone: a layer needs a Hopper GPU"),
    None: (mm.ConfigError, "device = None"),
}


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_are_not_there(tmp_path: Path, device: str):
    error, reason = DEVICES[device]
    folder = Model().write(tmp_path / "source")
    with pytest.raises(error, match=reason):
        load_experts(folder, 1, device=device)
    with pytest.raises(error, match=reason):
        convert(folder, tmp_path / "made", "fp8", device=device)
    assert not (tmp_path / "made").exists()


def test_a_model_is_refused_before_a_gpu_is_asked_for(tmp_path: Path):
    folder = Model(config={"hidden_act": "gelu", "num_experts_per_tok": 2}).write(tmp_path)
    with pytest.raises(mm.ConfigError, match="its activation is 'gelu'"):
        mm.MegaMoE.from_checkpoint(folder, 1, max_tokens=8, device="cuda:99")
    with pytest.raises(mm.ConfigError, match="layer 7 has no experts"):
        load_experts(Model().write(tmp_path), 7, device="cuda:99")


def test_the_configuration_names_its_folder(tmp_path: Path):
    folder = Model().write(tmp_path)
    assert dict.fromkeys(Files(folder / "config.json")) == dict.fromkeys(Files(folder))


@pytest.mark.parametrize("word", [0x7F80, 0x7FC0, 0xFFFF])
def test_values_that_are_no_numbers_are_not_made_into_numbers(tmp_path: Path, word: int):
    """MXFP4 has neither infinities nor NaN; they would become values of some size."""
    source = Model(kind="bf16").make()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    data = bytearray(source.tensors[name].data)
    data[2 * 259 : 2 * 260] = word.to_bytes(2, "little")
    source.tensors[name] = Tensor("BF16", source.tensors[name].shape, bytes(data))
    folder = source.write(tmp_path)
    with pytest.raises(mm.ConfigError, match=r"layer 1, expert 2, up: values\[1, 3\] is -?(inf|nan); allowed: finite"):
        load_experts(folder, 1, device="cpu", weight_format="mxfp4")


def test_gpt_oss_by_its_tensors_alone(tmp_path: Path):
    source = Model(fused=True).make()
    base = "model.layers.1.mlp.experts."
    source.tensors = {f"{base}{part}_proj_{kind}": BYTES for part in ("gate_up", "down") for kind in ("blocks", "bias")}
    with pytest.raises(mm.ConfigError, match="have biases|MXFP4 as gpt-oss has it"):
        load(source.write(tmp_path, shards=1))


def test_a_shared_expert_of_another_width(tmp_path: Path):
    made, other = model("deepseek-v3", intermediate=256), model("deepseek-v3", intermediate=128)
    made.tensors.update({key: each for key, each in other.tensors.items() if "shared" in key})
    with pytest.raises(mm.ConfigError, match="allowed: a multiple in width"):
        load_shared_experts(made.write(tmp_path), 1, device="cpu")


def test_a_clamp_that_is_no_number(tmp_path: Path):
    folder = model("deepseek-v4-base", config={**V3, "swiglu_limit": [7.0, 9.0]}).write(tmp_path)
    with pytest.raises(mm.ConfigError, match=r"swiglu_limit is \[7.0, 9.0\]"):
        mm.MegaMoE.from_checkpoint(folder, 1, max_tokens=8, device="cpu")


@pytest.mark.parametrize("clamp", [float("nan"), float("inf"), -1.0])
def test_a_clamp_that_no_layer_has(tmp_path: Path, clamp: float):
    found = inspect(Model(config={"swiglu_limit": clamp}).write(tmp_path))
    assert (found.usable, "swiglu_limit" in str(found.problem)) == (False, True)


def test_a_topk_that_nobody_says(tmp_path: Path):
    folder = Model().write(tmp_path)
    edit(folder, "config.json", lambda config: config.pop("num_experts_per_tok"))
    with pytest.raises(mm.ConfigError, match="topk: config.json does not say"):
        mm.MegaMoE.from_checkpoint(folder, 1, max_tokens=8, device="cpu")


def _truncate(folder: Path) -> None:
    path = folder / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-100])


def _swap(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "x")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "x").rename(folder / SHARDS[1])


def _huge_header(folder: Path) -> None:
    (folder / SHARDS[0]).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _pointer(name: str) -> Callable[[Path], object]:
    """As a clone has it where Git LFS is not installed."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4302348608\n"
    return lambda folder: (folder / name).write_text(text)


def _point(to: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder, INDEX, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], to)))

    return change


def _folder_for_a_file(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).mkdir()


def _pipe_for_a_file(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])


def _pipe_for_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "cannot be read.*cut short"),
    "missing": (lambda folder: (folder / SHARDS[0]).unlink(), "is not there; the index of .* names it"),
    "swapped": (_swap, "but the index says so; files of another model, or exchanged"),
    "empty": (lambda folder: (folder / SHARDS[0]).write_bytes(b""), "cannot be read"),
    "a header without end": (_huge_header, "cannot be read"),
    "a folder": (_folder_for_a_file, "is not there"),
    "a pipe": (_pipe_for_a_file, "is not there"),
    "an index that is a pipe": (_pipe_for_an_index, "no regular file"),
    "a pointer of Git LFS": (_pointer(SHARDS[0]), "cannot be read.*; it is what Git LFS leaves.*run `git lfs pull`"),
    "an index that is one": (_pointer(INDEX), "cannot be read.*; it is what Git LFS leaves.*run `git lfs pull`"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "cannot be read"),
    "deep JSON": (lambda folder: (folder / INDEX).write_text("[" * 200_000), "cannot be read"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "holds no JSON object"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "a map of numbers": (_point(7), "is 7; allowed: safetensors files in that folder"),  # type: ignore[arg-type]
    "above": (_point("../other/model.safetensors"), "allowed: safetensors files in that folder"),
    "absolute": (_point("/etc/model.safetensors"), "allowed: safetensors files in that folder"),
    "inside and out": (_point("a/../../model.safetensors"), "allowed: safetensors files in that folder"),
    "no safetensors": (_point("pytorch_model.bin"), "allowed: safetensors files in that folder"),
    "NUL": (_point("a\0.safetensors"), "allowed: safetensors files in that folder"),
    "4 KB": (_point("m" * 4096 + ".safetensors"), "cannot be read: File name too long"),
    "config": (lambda folder: (folder / "config.json").write_text("?"), "config.json cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(tmp_path: Path, what: str):
    damage, says = DAMAGE[what]
    folder = Model().write(tmp_path / "model")
    damage(folder)
    with pytest.raises(mm.CheckpointError, match=says) as error:
        load(folder)
    assert len(str(error.value)) < 1000


def test_tensors_with_names_of_4_kb(tmp_path: Path):
    prefix = "p" * 4000 + "."
    folder = Model(prefix=prefix).write(tmp_path)
    load(folder)
    (folder / SHARDS[0]).unlink()
    _swapped = Model(prefix=prefix, layers=(1, 2)).make()
    write_file(folder / SHARDS[0], {"other": next(iter(_swapped.tensors.values()))})
    with pytest.raises(mm.CheckpointError, match=r"holds no tensor 'p+\.\.\.") as error:
        load(folder)
    assert len(str(error.value)) < 1000


def test_names_that_steer_a_terminal_are_spelled_out(tmp_path: Path):
    folder = Model().write(tmp_path)
    _point("\x1b[2J.safetensors")(folder)
    with pytest.raises(mm.CheckpointError) as error:
        load(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("path", ["nothing", "a\0b", "x" * 5000], ids=["absent", "NUL", "long"])
def test_a_place_that_is_not_there(tmp_path: Path, path: str):
    with pytest.raises(mm.ConfigError):
        load(tmp_path / path)


def test_a_folder_with_nothing_or_with_too_much(tmp_path: Path):
    with pytest.raises(mm.CheckpointError, match="no safetensors file"):
        load(tmp_path)
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(mm.CheckpointError, match=r"no safetensors file; .*\(a folder in snapshots has them\)"):
        load(tmp_path)
    folder = Model().write(tmp_path)
    (folder / INDEX).unlink()
    with pytest.raises(mm.CheckpointError, match="3 safetensors files; allowed: an index, or one file"):
        load(folder)


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Model().write(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(mm.ToolchainError, match=r"run: pip install 'safetensors>=[\d.]+'$") as caught:
        load(folder)
    required = str(caught.value).rpartition("pip install ")[2].strip("'")
    assert f'checkpoints = ["{required}"]' in (REPO / "pyproject.toml").read_text(encoding="utf-8")


def test_what_is_no_checkpoint_is_refused_before_the_library_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    notes = tmp_path / "notes.md"
    notes.write_text("no checkpoint")
    with pytest.raises(mm.ConfigError, match=r"notes.md' is no checkpoint; allowed: a folder, an index \(.json\) or a"):
        load(notes)
    with pytest.raises(mm.ConfigError, match="nothing' is not there; allowed: a folder"):
        load(tmp_path / "nothing")


def test_the_models_of_these_tests_are_as_varied_as_it_says():
    assert {how.get("scales", "F32") for how in MODELS.values()} == {"F32", "BF16", "F16", "F8_E8M0"}
