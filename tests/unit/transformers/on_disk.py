"""Tiny models of transformers as their makers publish them: experts in FP8 or MXFP4, all else in float32."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import Model, Tensor, write_file
from tests.unit.transformers.models import EXPERTS, WIDTH, make


def publish(folder: Path, name: str, source: Model) -> Path:
    """A model of `models.MODELS` with the experts of `source`, which has its names, in a folder as one fetches it."""
    from safetensors.torch import load_file

    made = make(name)
    made.save_pretrained(folder)
    whole = folder / "model.safetensors"
    tensors = {
        key: Tensor("BF16", tuple(value.shape), value.view(torch.int16).numpy().tobytes())
        if value.dtype is torch.bfloat16
        else Tensor(
            {torch.float32: "F32", torch.int64: "I64"}[value.dtype], tuple(value.shape), value.numpy().tobytes()
        )
        for key, value in load_file(whole).items()
        if not re.search(r"\.experts\.", key)
    }
    experts = {key: value for key, value in source.tensors.items() if ".experts." in key}
    write_file(whole, {**tensors, **experts}, {"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    kept = [key for key, module in made.named_modules() if isinstance(module, torch.nn.Linear)]  # theirs needs a GPU
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    if source.scales == "F8_E8M0":
        quantization["scale_fmt"] = "ue8m0"
    if source.kind == "mxfp4":
        config["expert_dtype"] = "fp4"
    config["quantization_config"] = {**quantization, "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def experts_like(name: str, **how: Any) -> Model:
    """Experts of the sizes of the tiny models, named as in DeepSeek-V3 or as in V4; weights of about the usual size."""
    names = {"gate": "w1", "up": "w3", "down": "w2", "block": "ffn", "scale": "scale", "scales": "F8_E8M0"}
    sizes = {"experts": EXPERTS, "hidden": WIDTH, "intermediate": WIDTH, "layers": (0, 1)}
    return Model(**{**(names if name == "DeepseekV4Config" else {}), **sizes, **how}).make()


def values_of(source: Model, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both matrices of all experts of a layer, float32."""
    pairs = [source.expert(layer, expert) for expert in range(source.experts)]
    gate_up, down = (np.stack([pair[i] for pair in pairs]) for i in range(2))
    return torch.from_numpy(gate_up), torch.from_numpy(down)
