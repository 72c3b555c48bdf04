"""Files whose parts do not fit each other: said by `inspect`, and before anything is loaded or written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megamoe_jit as mm
from megamoe_jit._layer import marks
from megamoe_jit.checkpoints import convert, inspect, load_experts, load_shared_experts
from megamoe_jit.checkpoints.convert import _STATE
from megamoe_jit.checkpoints.files import Files
from tests.checkpoints import Model, Tensor, model, write_file

CPU = torch.device("cpu")


def fewer(made: Model, ending: str, count: int) -> Model:
    """A model whose tensors with this ending hold only the first of the experts."""
    for name, tensor in made.tensors.items():
        if name.endswith(ending):
            size = len(tensor.data) // tensor.shape[0]
            made.tensors[name] = Tensor(tensor.dtype, (count, *tensor.shape[1:]), tensor.data[: count * size])
    return made


def no_shared_width() -> Model:
    made = model("deepseek-v3")
    for name, tensor in made.tensors.items():
        if "shared_experts" in name:
            shape = (tensor.shape[0], 0) if "down" in name else (0, tensor.shape[1])
            made.tensors[name] = Tensor(tensor.dtype, shape, b"")
    return made


SIZES: dict[str, tuple[Callable[[], Model], type[mm.MegaMoeError], str]] = {
    "down of fewer experts": (lambda: fewer(model("fused-fp8"), "down_proj", 3), mm.CheckpointError, "down.* has 3 ex"),
    "scales of fewer": (lambda: fewer(model("fused-fp8"), "gate_up_proj_scale_inv", 2), mm.CheckpointError, "has 2 ex"),
    "none": (lambda: fewer(fewer(model("fused-fp8"), "proj", 0), "inv", 0), mm.CheckpointError, "has 0 experts"),
    "no width": (lambda: Model(intermediate=0, kind="bf16").make(), mm.ConfigError, "intermediate size 0; allowed"),
    "no depth": (lambda: Model(hidden=0, kind="bf16").make(), mm.ConfigError, "hidden size 0 and .*; allowed"),
    "shared": (no_shared_width, mm.ConfigError, "shared expert of layer 1: .*intermediate size 0; allowed"),
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_that_no_layer_has(tmp_path: Path, what: str):
    make, error, says = SIZES[what]
    folder = make().write(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    del config["num_experts"]  # which would tell
    (folder / "config.json").write_text(json.dumps(config))
    load = load_shared_experts if what == "shared" else load_experts
    with pytest.raises(error, match=says):
        load(folder, 1, device=CPU)
    assert says.split(".*")[-1] in str(inspect(folder).layers[0].problem)
    if what != "shared":  # which is copied as it is
        with pytest.raises(error, match=says):
            convert(folder, tmp_path / "made", "fp8")
        assert not (tmp_path / "made").exists()


def test_a_clamp_that_no_float_holds(tmp_path: Path):
    folder = Model(config={"swiglu_limit": 10**400}).write(tmp_path)
    found = inspect(folder)
    assert (found.usable, "swiglu_limit" in str(found.problem)) == (False, True)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0])
def test_inspect_says_of_scales_that_are_no_numbers(tmp_path: Path, scale: float):
    made = model("qwen3-moe", scales="F32")
    name = "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv"
    made.tensors[name] = Tensor("F32", (1, 2), struct.pack("<ff", scale, 2.0**-12))
    layer = inspect(made.write(tmp_path)).layers[0]
    if scale == 0:
        assert (layer.usable, layer.spread.most) == (True, -10)
    else:
        assert not layer.usable
        assert f"layer 1, expert 0, gate: 1 scales are {scale}" in layer.problem


def test_inspect_of_scales_that_are_all_zero(tmp_path: Path):
    made = model("qwen3-moe", scales="F32")
    for name, tensor in made.tensors.items():
        if "scale" in name:
            made.tensors[name] = Tensor("F32", tensor.shape, bytes(len(tensor.data)))
    assert [(layer.usable, layer.spread) for layer in inspect(made.write(tmp_path)).layers] == [(True, None)] * 2


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object], metadata: bool = True) -> Path:
    """A converted model whose first file is written again."""
    file = folder / "experts-00000.safetensors"
    head = Files(file)
    tensors = {
        name: Tensor(*head.entry(name), head.read(name).contiguous().view(torch.uint8).numpy().tobytes())
        for name in head
    }
    change(tensors)
    write_file(file, tensors, head.metadata(file.name) if metadata else None)
    return folder


def as_other(ending: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Callable[..., object]:
    def change(tensors: dict[str, Tensor]) -> None:
        (name,) = (name for name in tensors if name.endswith(ending))
        tensors[name] = Tensor(dtype or tensors[name].dtype, shape or tensors[name].shape, tensors[name].data)

    return change


READY = {
    "dtype": (as_other("w2", dtype="F8_E5M2"), "w2' is F8_E5M2 .*allowed: F8_E4M3"),
    "scales": (
        as_other("w13_scales", shape=(4, 2, 2, 1)),
        r"w13_scales' is F32 \(4, 2, 2, 1\); allowed: F32 \(4, 2, 2\)",
    ),
    "experts": (as_other("w2", shape=(2, 512, 128)), r"allowed: F8_E4M3 \(4, 256, 128\)"),
    "flat": (as_other("w13", shape=(4 * 256 * 256,)), "has shape .*; allowed: .experts, 2"),
    "no size": (as_other("w13", shape=(4 * 256, 256, 1)), "has shape .*; allowed: .experts, 2"),
}


@pytest.mark.parametrize("what", READY)
def test_experts_in_the_kernels_order_whose_parts_do_not_fit(tmp_path: Path, what: str):
    change, says = READY[what]
    convert(model("qwen3-moe").write(tmp_path / "source"), tmp_path / "ready", "megamoe")
    folder = rewritten(tmp_path / "ready", change)
    with pytest.raises(mm.CheckpointError, match=says):
        load_experts(folder, 1, device=CPU)
    found = inspect(folder)
    assert [layer.usable for layer in found.layers] == [False, True]


def test_inspect_says_of_another_order_and_another_number_of_experts(tmp_path: Path):
    convert(model("qwen3-moe").write(tmp_path / "source"), tmp_path / "ready", "megamoe")
    config = tmp_path / "ready" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_experts": 4', '"num_experts": 8'))
    assert "has 4 experts; allowed: 8" in str(inspect(tmp_path / "ready").layers[0].problem)
    config.write_text(text)
    folder = rewritten(tmp_path / "ready", lambda tensors: None, metadata=False)
    assert "the order of this version" in str(inspect(folder).layers[0].problem)


def test_tensors_of_every_dtype_beside_the_experts_are_copied(tmp_path: Path):
    sizes = {"C64": 64, "F64": 64, "U64": 64, "I32": 32, "U16": 16, "BOOL": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F4": 4}
    made = Model(layers=(1,)).make()
    for dtype, width in sizes.items():
        made.tensors[f"other.{dtype}"] = Tensor(dtype, (3, 8), bytes(n % 2 for n in range(24 * width // 8)))
    folder = made.write(tmp_path / "source")
    convert(folder, tmp_path / "fp8", "fp8")
    before, after = Files(folder), Files(tmp_path / "fp8")
    for dtype in sizes:
        name = f"other.{dtype}"
        assert after.entry(name) == before.entry(name)
        assert after.read(name).view(torch.uint8).tolist() == before.read(name).view(torch.uint8).tolist()


def test_tensors_that_cannot_be_copied_are_said_before_anything_is_written(tmp_path: Path):
    made = Model().make()
    made.tensors["other"] = Tensor("F6_E2M3", (4, 4), bytes(12))
    with pytest.raises(mm.ConfigError, match="'other' is F6_E2M3, which cannot be copied; allowed: .*BF16"):
        convert(made.write(tmp_path / "source"), tmp_path / "made", "fp8")
    gone = Model().write(tmp_path / "gone")
    index = json.loads((gone / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "lost.safetensors"
    (gone / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(mm.CheckpointError, match=r"'lost\.safetensors' is not there"):
        convert(gone, tmp_path / "made", "fp8")
    assert not (tmp_path / "made").exists()


def test_a_conversion_by_other_names_or_into_another_order_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    two = Model(layers=(1,)).make()
    two.tensors |= Model(layers=(1,), fused=True, seed=1).make().tensors
    folder = two.write(tmp_path / "source")
    convert(folder, tmp_path / "fp8", "fp8", scheme="fused")
    with pytest.raises(mm.ConfigError, match="another scheme"):
        convert(folder, tmp_path / "fp8", "fp8", scheme="deepseek-v3")
    convert(folder, tmp_path / "ready", "megamoe", scheme="fused")
    monkeypatch.setattr(marks, "LAYOUT", "megamoe-sm90-0")
    with pytest.raises(mm.ConfigError, match="another order"):
        convert(folder, tmp_path / "ready", "megamoe", scheme="fused")


def test_a_conversion_that_an_older_version_began_goes_on(tmp_path: Path):
    folder = Model(layers=(1,)).write(tmp_path / "source")
    convert(folder, tmp_path / "fp8", "fp8")
    state = tmp_path / "fp8" / _STATE
    old = json.loads(state.read_text())
    state.write_text(json.dumps({name: old[name] for name in ("source", "format", "lossy", "files")}))
    seen: list[str] = []
    convert(folder, tmp_path / "fp8", "fp8", report=lambda _, became: seen.append(became))
    assert set(seen) == {"verified"}
