"""Checkpoints in the kernel's order, which `convert --format megamoe` writes: mapped from their files, and not changed.

All experts of a layer are one tensor, `layers.L.mlp.experts.w13` and `w2`, with `_scales` and `_exponents` for what
belongs to them. The files' metadata name the order, and a version that reads another one refuses them.
"""

from __future__ import annotations

import torch

from megamoe_jit._errors import CheckpointError, ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.marks import check_metadata
from megamoe_jit._layer.weights import mark_transformed
from megamoe_jit._spec.formats import FP8, MXFP4, WeightFormat
from megamoe_jit._text import shown
from megamoe_jit.checkpoints.files import Files
from megamoe_jit.checkpoints.names import LayerNames, ModelNames
from megamoe_jit.checkpoints.stored import experts_of_rank

__all__ = ["format_of_ready", "load_ready", "sizes_of_ready"]


def format_of_ready(names: LayerNames) -> WeightFormat:
    """The format of a layer's experts."""
    return MXFP4 if "exponents" in names.whole.get("w13", {}) else FP8


def sizes_of_ready(files: Files, names: LayerNames) -> tuple[int, int, int]:
    """Experts, hidden and intermediate size of a layer; raises `CheckpointError` if they are not to be found."""
    codes = names.whole.get("w13", {}).get("weight")
    if codes is None:
        raise CheckpointError("w13 and what belongs to it are not there")
    shape = files.entry(codes).shape
    if len(shape) != 3:
        raise CheckpointError(f"{codes} has shape {tuple(shape)}; allowed: [experts, N, K]")
    experts, rows, stored = shape
    return experts, format_of_ready(names).depth_of(stored), rows // 2


def load_ready(
    files: Files, model: ModelNames, layer: int, device: torch.device, rank: int, ranks: int, weight_format: str
) -> tuple[WeightTensors, WeightTensors]:
    """Both pairs of a rank's experts, in the kernel's order and marked so.

    Raises:
        ConfigError: they are in the order of another version, or another format was asked for.
        CheckpointError: a tensor is not there.
    """
    names = model.layers.get(layer)
    if names is None:
        raise ConfigError(f"layer {shown(layer)} has no experts in this checkpoint; allowed: {sorted(model.layers)}")
    matrices = []
    weights = format_of_ready(names)
    for part in ("w13", "w2"):
        kinds = names.whole.get(part, {})
        wanted = ("weight", "exponents", "scale") if weights.group else ("weight", "scale")
        if set(kinds) != set(wanted):
            raise CheckpointError(f"layer {layer}: {part} and what belongs to it are not there")
        if weight_format not in ("auto", weights.name):
            given = f"weight_format = {shown(weight_format)}"
            raise ConfigError(f"{given}; allowed: auto or {weights.name}, which this checkpoint holds")
        check_metadata(files.metadata(files.file_of(kinds["weight"])), weights)
        chosen = experts_of_rank(files.entry(kinds["weight"]).shape[0], rank, ranks)
        matrices.append(tuple(files.read_range(kinds[kind], chosen).to(device) for kind in wanted))
    l1, l2 = matrices
    mark_transformed(l1, l2)
    return l1, l2
