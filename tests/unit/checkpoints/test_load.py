"""`load_experts`: every scheme of names and kind of weights, bit for bit, by ranks; shared experts."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import pytest
import torch

import megamoe_jit as mm
from megamoe_jit.checkpoints import convert, load_experts, load_shared_experts
from megamoe_jit.checkpoints.files import Files
from tests.checkpoints import MODELS, Model, model

EXACT = [name for name, how in MODELS.items() if how.get("kind", "fp8") not in ("bf16", "f16", "f32")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """A model by name, written once."""
    made: dict[str, tuple[Model, Path]] = {}

    def get(name: str) -> tuple[Model, Path]:
        if name not in made:
            fresh = model(name)
            made[name] = fresh, fresh.write(tmp_path_factory.mktemp(name))
        return made[name]

    return get


def values(pair) -> np.ndarray:
    return mm.dequantize_weights(*pair).numpy()


@pytest.mark.parametrize("name", EXACT)
def test_fp8_is_what_the_model_says_to_the_last_bit(written, name: str):
    source, folder = written(name)
    for layer in source.layers:
        w13, w2 = load_experts(folder, layer, device=CPU, weight_format="fp8")
        assert (w13[0].dtype, w13[1].dtype) == (torch.float8_e4m3fn, torch.float32)
        for expert in range(source.experts):
            gate_up, down = source.expert(layer, expert)
            assert np.array_equal(values((w13[0][expert], w13[1][expert])), gate_up)
            assert np.array_equal(values((w2[0][expert], w2[1][expert])), down)


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(EXACT)))
def test_values_are_quantised_as_quantize_weights_does(written, name: str):
    source, folder = written(name)
    w13, w2 = load_experts(folder, 1, device=CPU)
    for expert in range(source.experts):
        for found, wanted in zip((w13, w2), source.expert(1, expert), strict=True):
            codes, scales = mm.quantize_weights(torch.from_numpy(wanted.copy()))
            assert torch.equal(found[0][expert].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(found[1][expert], scales)


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "deepseek-v4"])
def test_values_in_bf16(written, name: str):
    source, folder = written(name)
    w13, w2 = load_experts(folder, 2, device=CPU, weight_format="bf16")
    assert w13.dtype is w2.dtype is torch.bfloat16
    for expert in range(source.experts):
        for found, wanted in zip((w13, w2), source.expert(2, expert), strict=True):
            assert torch.equal(found[expert], torch.from_numpy(wanted.copy()).bfloat16())


@pytest.mark.parametrize("name", ["deepseek-v3", "fused-fp8", "mixtral"])
def test_ranks_read_equal_parts_and_together_everything(written, name: str):
    _, folder = written(name)
    whole = load_experts(folder, 1, device=CPU)
    parts = [load_experts(folder, 1, device=CPU, rank=rank, ranks=2) for rank in range(2)]
    for matrix in range(2):
        for piece in range(2):
            together = torch.cat([part[matrix][piece].view(torch.uint8) for part in parts])
            assert torch.equal(together, whole[matrix][piece].view(torch.uint8))


def test_json_with_a_byte_order_mark(tmp_path: Path):
    folder = Model().write(tmp_path)
    for name in ("config.json", "model.safetensors.index.json"):
        path = folder / name
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    load_experts(folder, 1, device="cpu")


def test_a_rank_opens_only_the_files_of_its_experts(tmp_path: Path):
    source = model("deepseek-v3", layers=(1,), shared="")
    folder = source.write(tmp_path, shards=4)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()  # with the last experts
    load_experts(folder, 1, device=CPU, rank=0, ranks=2)
    with pytest.raises(mm.CheckpointError, match="is not there"):
        load_experts(folder, 1, device=CPU, rank=1, ranks=2)


def test_progress_counts_experts(written):
    _, folder = written("deepseek-v3")
    seen: list[tuple[int, int]] = []
    load_experts(folder, 1, device=CPU, ranks=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_one_file_or_an_index_is_enough(tmp_path: Path):
    source = model("qwen3-moe")
    folder = source.write(tmp_path, shards=1)
    (file,) = folder.glob("*.safetensors")
    by_index = load_experts(folder / "model.safetensors.index.json", 1, device=CPU)
    by_file = load_experts(file, 1, device=CPU)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").unlink()
    by_folder = load_experts(folder, 1, device=CPU)
    for found in (by_file, by_folder):
        assert all(torch.equal(a[1], b[1]) for a, b in zip(found, by_index, strict=True))


@pytest.mark.parametrize("wide", [1, 2])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4", "qwen3.5-moe"])
def test_shared_experts_are_as_many_as_they_are_wide(tmp_path: Path, name: str, wide: int):
    source = model(name, shared_width=wide)
    shared = load_shared_experts(source.write(tmp_path), 1, device=CPU)
    assert shared is not None
    (w13, w2), width = shared, source.intermediate
    assert w13[0].shape == (wide, 2 * width, source.hidden)
    base = f"{source.prefix}layers.1.{source.block}.{source.shared}."
    gate, up, down = (source.values[base + part] for part in (source.gate, source.up, source.down))
    for expert in range(wide):
        rows = slice(expert * width, (expert + 1) * width)
        assert np.array_equal(values((w13[0][expert], w13[1][expert])), np.concatenate((gate[rows], up[rows])))
        assert np.array_equal(values((w2[0][expert], w2[1][expert])), down[:, rows])


def test_a_layer_without_a_shared_expert(written):
    assert load_shared_experts(written("mixtral")[1], 1, device=CPU) is None


def test_layers_that_predict_further_tokens_are_not_taken_for_the_models_own(tmp_path: Path):
    source = model("deepseek-v4-base")
    other = model("deepseek-v4-base", prefix="mtp.", layers=(1,), seed=9)
    source.tensors |= other.tensors
    w13, _ = load_experts(source.write(tmp_path), 1, device=CPU)
    assert np.array_equal(values((w13[0][0], w13[1][0])), source.expert(1, 0)[0])


def test_per_channel_needs_a_word_and_is_then_close(tmp_path: Path):
    source = model(
        "deepseek-v3", kind="fp8-channel", scale="weight_scale", config={"model_type": "glm4_moe"}, shared=""
    )
    folder = source.write(tmp_path)
    with pytest.raises(mm.ConfigError, match="a scale for each row.*lossy=True"):
        load_experts(folder, 1, device=CPU)
    w13, _ = load_experts(folder, 1, device=CPU, lossy=True)
    found, wanted = values((w13[0][0], w13[1][0])), source.expert(1, 0)[0]
    assert 0 < np.abs(found - wanted).max() <= np.abs(wanted).max() / 16


def test_the_exponents_of_scales_are_powers_of_two_at_both_ends():
    from megamoe_jit.checkpoints.convert_weights import scales_of

    ends = torch.tensor([0, 1, 126, 127, 254], dtype=torch.uint8)
    assert scales_of(ends).tolist() == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0**127]
    assert torch.equal(scales_of(ends.view(torch.float8_e8m0fnu)), scales_of(ends))


def test_nothing_is_read_that_nobody_asks_for(written):
    files = Files(written("deepseek-v3")[1])
    assert len(files) > 50
    assert files._opened == {}


def test_mxfp4_stays_as_it_is_by_default(written):
    source, folder = written("deepseek-v4")
    w13, w2 = load_experts(folder, 1, device=CPU)
    assert (w13[0].dtype, w13[1].dtype) == (torch.uint8, torch.float8_e8m0fnu)
    for expert in range(source.experts):
        base = f"layers.1.ffn.experts.{expert}."
        for found, parts in ((w13, ("w1", "w3")), (w2, ("w2",))):
            codes = b"".join(source.tensors[f"{base}{part}.weight"].data for part in parts)
            exponents = b"".join(source.tensors[f"{base}{part}.scale"].data for part in parts)
            assert found[0][expert].numpy().tobytes() == codes
            assert found[1][expert].view(torch.uint8).numpy().tobytes() == exponents


def test_values_as_mxfp4_are_the_nearest_there_are(tmp_path: Path):
    from megamoe_jit._layer import mxfp4

    source = model("qwen3-moe-bf16")
    w13, _ = load_experts(source.write(tmp_path), 1, device=CPU, weight_format="mxfp4")
    found, wanted = mxfp4.dequantize(w13[0][0], w13[1][0]).numpy(), source.expert(1, 0)[0]
    groups, made = wanted.reshape(-1, 32), found.reshape(-1, 32)
    largest = np.abs(groups).max(1, keepdims=True)
    step = np.exp2(np.floor(np.log2(largest)) - 2)  # the exponent of a group, and what its codes are counted in
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    nearest = np.abs(np.abs(groups)[..., None] - grid * step[..., None]).min(-1)
    assert np.allclose(np.abs(groups - made), np.maximum(nearest, np.abs(groups) - 6 * step))
    assert np.all((np.sign(made) == np.sign(groups)) | (made == 0))


def test_mxfp4_of_a_quantised_model_needs_a_word(written):
    with pytest.raises(mm.ConfigError, match="half the bits.*lossy=True"):
        load_experts(written("deepseek-v3")[1], 1, device=CPU, weight_format="mxfp4")


def test_a_layer_has_one_format(written, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(mm.ConfigError, match="a layer has one format.*weight_format='fp8'"):
        mm.MegaMoE.from_checkpoint(written("deepseek-v4")[1], 1, max_tokens=128, device=CPU, shared_experts=True)


def test_a_layer_has_one_order(written, tmp_path: Path):
    convert(written("deepseek-v3")[1], tmp_path, "megamoe")
    with pytest.raises(mm.ConfigError, match="kernel's order by themselves; allowed: shared_experts=False"):
        mm.MegaMoE.from_checkpoint(tmp_path, 1, max_tokens=128, device=CPU, shared_experts=True)
