"""`convert` and `inspect`: bit-exact there and back, whole models, ended and resumed, verified by digest."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit.checkpoints import convert, inspect, load_experts, load_shared_experts
from megamoe_jit.checkpoints.convert import _STATE, _State
from megamoe_jit.checkpoints.files import Files
from megamoe_jit.checkpoints.writing import Writer
from tests.checkpoints import MODELS, Model, Tensor, model
from tests.stubs import REPO

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def bits(given) -> list[bytes]:
    return [each.contiguous().view(torch.uint8).numpy().tobytes() for matrix in given for each in matrix]


def experts(folder: Path, layer: int = 1, **how) -> list[bytes]:
    return bits(load_experts(folder, layer, device=CPU, **how))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("float32", "float16", "per-tensor")])
def test_fp8_of_every_model_has_the_same_experts_and_all_the_rest(tmp_path: Path, name: str):
    source = model(name)
    folder = source.write(tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    done = convert(folder, tmp_path / "fp8", "fp8")
    made = tmp_path / "fp8"
    for layer in source.layers:
        assert experts(made, layer) == experts(folder, layer, weight_format="fp8")
    if source.shared and not source.fused:
        shared = [load_shared_experts(each, 1, device=CPU, weight_format="fp8") for each in (folder, made)]
        assert bits(shared[0]) == bits(shared[1])
    before, after = Files(folder), Files(made)
    rest = [each for each in before if ".experts." not in each]
    assert set(rest) == {each for each in after if ".experts." not in each}
    assert all(torch.equal(before.read(each), after.read(each)) for each in rest)
    assert (made / "tokenizer.json").exists()
    assert {file.name for file in done.files} == set(after.shards)
    config = json.loads((made / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "expert_dtype" not in config


@pytest.mark.parametrize(("name", "kind"), [("deepseek-v3", "fp8"), ("mixtral", "fp8"), ("deepseek-v4", "mxfp4")])
def test_the_kernels_order_is_what_a_transform_gives(tmp_path: Path, name: str, kind: str):
    folder = model(name).write(tmp_path / "source")
    convert(folder, tmp_path / "ready", "megamoe")
    plain = load_experts(folder, 2, device=CPU)
    wanted = mm.transform_weights_for_mega_moe_sm90(*plain)
    l1, l2 = load_experts(tmp_path / "ready", 2, device=CPU)
    assert mm.is_transformed(l1, l2)
    assert bits((l1, l2)) == bits(wanted)
    halves = [load_experts(tmp_path / "ready", 2, device=CPU, rank=rank, ranks=2) for rank in range(2)]
    for matrix in range(2):
        for part, whole in enumerate(wanted[matrix]):
            joined = torch.cat([half[matrix][part].view(torch.uint8) for half in halves])
            assert torch.equal(joined, whole.view(torch.uint8))
    with pytest.raises(mm.ConfigError, match=f"allowed: auto or {kind}"):
        load_experts(tmp_path / "ready", 2, device=CPU, weight_format="bf16")
    found = inspect(tmp_path / "ready", ranks=2)
    assert (found.usable, found.scheme, found.layers[0].kind) == (True, "megamoe", f"{kind}, in the kernel's order")
    assert found.bytes_per_rank == inspect(folder, ranks=2).bytes_per_rank


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4", "mixtral"])
def test_shared_experts_are_found_beside_the_kernels_order(tmp_path: Path, name: str):
    folder = model(name).write(tmp_path / "source")
    convert(folder, tmp_path / "ready", "megamoe")
    wanted, found = (load_shared_experts(each, 1, device=CPU) for each in (folder, tmp_path / "ready"))
    assert (wanted is None) == (name == "mixtral")
    assert wanted is None or bits(found) == bits(wanted)
    said = [inspect(each, ranks=2).layers[0] for each in (folder, tmp_path / "ready")]
    assert (said[0].shared, said[0].shared_experts) == (said[1].shared, said[1].shared_experts)


def test_experts_in_the_kernels_order_of_which_a_part_is_gone_are_a_damaged_checkpoint(tmp_path: Path):
    convert(model("deepseek-v3").write(tmp_path / "source"), tmp_path / "ready", "megamoe")
    index = tmp_path / "ready" / INDEX
    held = json.loads(index.read_text())
    held["weight_map"] = {name: file for name, file in held["weight_map"].items() if "1.mlp.experts.w13" not in name}
    index.write_text(json.dumps(held))
    says = "w13 and what belongs to it are not there"
    for load in (load_experts, load_shared_experts):
        with pytest.raises(mm.CheckpointError, match=says):
            load(tmp_path / "ready", 1, device=CPU)
    (damaged,) = [each for each in inspect(tmp_path / "ready", ranks=2).layers if each.layer == 1]
    assert not damaged.usable
    assert says in str(damaged)


def test_the_kernels_order_is_mapped_from_the_file(tmp_path: Path):
    convert(model("mixtral").write(tmp_path / "source"), tmp_path / "ready", "megamoe")
    (codes, _), _ = load_experts(tmp_path / "ready", 1, device=CPU, rank=1, ranks=2)
    spans = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [(*(int(end, 16) for end in span[0].split("-")), span[-1]) for span in spans]
    (file,) = [name for begin, end, name in ends if begin <= codes.data_ptr() < end]
    assert file == str(tmp_path / "ready/experts-00000.safetensors")


def test_an_order_of_another_version_is_refused(tmp_path: Path):
    folder = model("mixtral").write(tmp_path / "source")
    convert(folder, tmp_path / "ready", "megamoe")
    file = tmp_path / "ready" / "experts-00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b"megamoe-sm90-2", b"megamoe-sm90-1"))
    with pytest.raises(mm.ConfigError, match="the order of this version"):
        load_experts(tmp_path / "ready", 1, device=CPU)


def test_mxfp4_there_and_back(tmp_path: Path):
    folder = model("deepseek-v4").write(tmp_path / "source")
    convert(folder, tmp_path / "fp8", "fp8")
    convert(folder, tmp_path / "mxfp4", "mxfp4")
    assert experts(tmp_path / "mxfp4") == experts(folder)
    assert json.loads((tmp_path / "mxfp4/config.json").read_text())["expert_dtype"] == "fp4"
    assert experts(tmp_path / "fp8") == experts(folder, weight_format="fp8")
    values = convert(model("mixtral").write(tmp_path / "values"), tmp_path / "of-values", "mxfp4")
    assert values.format == "mxfp4"
    assert experts(tmp_path / "of-values") == experts(tmp_path / "values", weight_format="mxfp4")


def test_layers_that_predict_further_tokens_are_converted_too(tmp_path: Path):
    source = model("deepseek-v4")
    further = model("deepseek-v4", prefix="mtp.", layers=(0,), seed=4)
    source.tensors |= further.tensors
    convert(source.write(tmp_path / "source"), tmp_path / "fp8", "fp8")
    files = Files(tmp_path / "fp8")
    assert files.entry("mtp.layers.0.ffn.experts.0.w1.weight").dtype == "F8_E4M3"


def test_experts_that_cannot_be_converted_are_said_before_anything_is_written(tmp_path: Path):
    folder = model("deepseek-v3", kind="fp8-channel", config={}).write(tmp_path / "source")
    with pytest.raises(mm.ConfigError, match="lossy=True"):
        convert(folder, tmp_path / "fp8", "fp8")
    assert not (tmp_path / "fp8").exists()
    convert(folder, tmp_path / "fp8", "fp8", lossy=True)
    assert experts(tmp_path / "fp8") == experts(folder, lossy=True)


DAMAGE = {
    "no up": ("3.up_proj.weight", None, "no weight of up of expert 3"),
    "no scale": ("3.up_proj.weight_scale_inv", None, "is F8_E4M3 without scales"),
    "of integers": ("3.up_proj.weight", Tensor("I64", (128, 256), bytes(8 * 128 * 256)), "is I64"),
    "larger": ("3.down_proj.weight_scale_inv", Tensor("F32", (256, 1), bytes(1024)), "is fp8-channel.*allowed: fp8"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_every_expert_is_looked_at_before_anything_is_written(tmp_path: Path, what: str):
    name, tensor, reason = DAMAGE[what]
    source = Model().make()
    whole = f"model.layers.2.mlp.experts.{name}"
    if tensor is None:
        del source.tensors[whole]
    else:
        source.tensors[whole] = tensor
    folder = source.write(tmp_path / "source")
    found = inspect(folder)
    assert ([layer.usable for layer in found.layers], found.usable) == ([True, False], False)
    assert re.search(reason, found.layers[1].problem)
    with pytest.raises(mm.MegaMoeError, match=reason):
        convert(folder, tmp_path / "made", "fp8")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("weight_format", ["fp8", "megamoe"])
def test_exponents_that_cannot_be_converted_are_said_with_their_place(tmp_path: Path, weight_format: str):
    source = model("deepseek-v4")
    name = "layers.2.ffn.experts.3.w1.scale"
    source.tensors[name] = Tensor("F8_E8M0", source.tensors[name].shape, b"\xff" * len(source.tensors[name].data))
    with pytest.raises(mm.ConfigError, match="layer 2, expert 3.* is 255"):
        convert(source.write(tmp_path / "source"), tmp_path / "made", weight_format)


def test_two_conversions_do_not_write_into_one_folder(tmp_path: Path):
    folder, made = model("qwen3-moe").write(tmp_path / "source"), tmp_path / "made"
    refused = []

    def at_once(name: str, became: str) -> None:
        with pytest.raises(mm.ConfigError, match="another conversion") as caught:
            convert(folder, made, "fp8")
        refused.append(str(caught.value))

    convert(folder, made, "fp8", report=at_once)
    assert refused
    assert experts(made) == experts(folder)
    convert(folder, made, "fp8")  # nothing is held


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_full_disk_is_said_with_the_file_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str):
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, made = model("qwen3-moe").write(tmp_path / "source"), tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(*((Writer, "put") if ending == "safetensors" else (Path, "write_text")), full)
        with pytest.raises(OSError, match=f"No space left on device; what is finished.*{ending}") as caught:
            convert(folder, made, "fp8")
    assert caught.value.errno == errno.ENOSPC
    convert(folder, made, "fp8")
    assert experts(made) == experts(folder)


def test_ended_before_its_first_file_is_entered_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ended(*_: object) -> dict[str, object]:
        raise KeyboardInterrupt

    folder, made = model("qwen3-moe").write(tmp_path / "source"), tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(_State, "add", ended)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, made, "fp8")
    assert (made / "experts-00000.safetensors").exists()
    convert(folder, made, "fp8")
    assert experts(made) == experts(folder)


def test_what_is_finished_is_verified_and_not_written_again(tmp_path: Path):
    folder, made = model("qwen3-moe").write(tmp_path / "source"), tmp_path / "fp8"
    convert(folder, made, "fp8")
    (made / INDEX).unlink()
    last = sorted(made.glob("others-*"))[-1]
    state = json.loads((made / _STATE).read_text())
    del state["files"][last.name]
    (made / _STATE).write_text(json.dumps(state))
    last.rename(made / (last.name + ".partial"))  # as it is where it was ended
    seen: list[tuple[str, str]] = []
    convert(folder, made, "fp8", report=lambda *each: seen.append(each))
    assert [name for name, became in seen if became == "written"] == [last.name]
    assert {became for name, became in seen if name != last.name} == {"verified"}
    assert experts(made) == experts(folder)
    assert not list(made.glob("*.partial"))


def test_a_finished_file_that_changed_is_an_error(tmp_path: Path):
    folder, made = model("qwen3-moe").write(tmp_path / "source"), tmp_path / "fp8"
    convert(folder, made, "fp8")
    file = made / "experts-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(mm.CheckpointError, match="is not what was written"):
        convert(folder, made, "fp8")
    file.unlink()
    with pytest.raises(mm.CheckpointError, match="cannot be read"):
        convert(folder, made, "fp8")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    folder, made = model("qwen3-moe").write(tmp_path / "source"), tmp_path / "there"
    made.mkdir()
    (made / "mine").write_text("")
    with pytest.raises(mm.ConfigError, match="is not empty"):
        convert(folder, made, "fp8")
    with pytest.raises(mm.ConfigError, match="is the source itself"):
        convert(folder, folder, "fp8")
    with pytest.raises(mm.ConfigError, match="format 'int4' is not supported"):
        convert(folder, made, "int4")
    convert(folder, tmp_path / "fp8", "fp8")
    with pytest.raises(mm.ConfigError, match="another format"):
        convert(folder, tmp_path / "fp8", "megamoe")
    os.utime(next(folder.glob("*.safetensors")))
    with pytest.raises(mm.ConfigError, match="another source"):
        convert(folder, tmp_path / "fp8", "fp8")
    (tmp_path / "fp8" / _STATE).write_text("{}")
    with pytest.raises(mm.CheckpointError, match="cannot be read"):
        convert(folder, tmp_path / "fp8", "fp8")


def test_a_conversion_that_is_killed_goes_on(tmp_path: Path):
    """Killed when two of its files are there; the result is, byte by byte, that of one that was not."""
    folder = Model(layers=tuple(range(6)), hidden=512, intermediate=512).write(tmp_path / "source")
    made, whole = tmp_path / "fp8", tmp_path / "whole"
    code = "import sys; from megamoe_jit.checkpoints import convert; convert(*sys.argv[1:], 'fp8')"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(made)], env=environment)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None and len(list(made.glob("experts-*s"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    finished = set(made.glob("*.safetensors"))
    assert not (made / INDEX).exists(), "it was faster than this test"
    seen: list[str] = []
    convert(folder, made, "fp8", report=lambda _, became: seen.append(became))
    assert len(finished) - 1 <= seen.count("verified") <= len(finished)
    convert(folder, whole, "fp8")
    for file in whole.iterdir():
        assert (made / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("deepseek-v3", "fp8"), ("deepseek-v4", "mxfp4"), ("mixtral", "values")])
def test_inspect(tmp_path: Path, name: str, kind: str):
    source = model(name)
    found = inspect(source.write(tmp_path), ranks=2, experts=2)
    assert (found.usable, found.topk, found.clamp) == (True, 2, 10.0 if name == "deepseek-v4" else None)
    assert [layer.layer for layer in found.layers] == list(source.layers)
    layer = found.layers[0]
    assert (layer.kind, layer.experts, layer.hidden, layer.intermediate) == (kind, 4, 256, 128)
    assert (layer.shared, layer.shared_experts) == (("fp8", 1) if source.shared else (None, None))
    weights = load_experts(tmp_path, 1, device=CPU, ranks=2)
    if kind == "mxfp4":
        weights = mm.transform_weights_for_mega_moe_sm90(*weights)
    assert layer.bytes_per_rank == sum(map(len, bits(weights)))
    assert found.bytes_per_rank == 2 * layer.bytes_per_rank
    if kind == "values":
        assert layer.spread is None
        return
    assert layer.spread.experts == 2
    assert -14 <= layer.spread.least <= layer.spread.most <= -4
    if kind == "mxfp4":
        assert layer.spread.blocks == layer.spread.exact == layer.spread.exact_fp8 == 2 * 3 * 2
        assert 0 < layer.spread.binades < 15


def test_inspect_says_what_cannot_be_used(tmp_path: Path):
    refused = inspect(Model(config={"hidden_act": "gelu"}).write(tmp_path / "a"))
    assert (refused.usable, refused.layers, "'gelu'" in refused.problem) == (False, (), True)
    source = Model().make()
    del source.tensors["model.layers.2.mlp.experts.0.up_proj.weight"]
    partly = inspect(source.write(tmp_path / "b"))
    assert [(layer.layer, layer.usable) for layer in partly.layers] == [(1, True), (2, False)]
    assert "no weight of up" in partly.layers[1].problem
    rows = inspect(Model(kind="fp8-channel", config={}).write(tmp_path / "c"))
    assert (rows.usable, "lossy=True" in rows.layers[0].problem) == (False, True)
