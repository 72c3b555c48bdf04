"""Checkpoints in the kernel's order, which `convert --format megamoe` writes: mapped from their files, and not changed.

All experts of a layer are one tensor, `layers.L.mlp.experts.w13` and `w2`, with `_scales` and `_exponents` for what
belongs to them. The files' metadata name the order, and a version that reads another one refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe_jit._errors import CheckpointError, ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.marks import check_metadata
from megamoe_jit._layer.weights import mark_transformed
from megamoe_jit._spec import BLOCK
from megamoe_jit._spec.formats import FP8, MXFP4, WeightFormat
from megamoe_jit._text import shown
from megamoe_jit.checkpoints.files import Entry, Files
from megamoe_jit.checkpoints.names import MEGAMOE, ModelNames
from megamoe_jit.checkpoints.stored import Stored, check_count, experts_of_rank, layer_of, names_in

#: What safetensors calls the dtypes of weights.
DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.float32: "F32", torch.float8_e8m0fnu: "F8_E8M0"}
_KINDS = {"codes": "weight", "exponents": "exponents", "scales": "scale"}  #: of a tensor's name, by part


@dataclass(frozen=True, slots=True)
class Ready:
    """Experts of a layer in the kernel's order.

    Attributes:
        weights: their format.
        experts: their number.
        hidden, intermediate: sizes.
        names: of the tensors of `w13` and of `w2`, in the order of the format's parts.
    """

    weights: WeightFormat
    experts: int
    hidden: int
    intermediate: int
    names: tuple[list[str], list[str]]


def entries_of(weights: WeightFormat, experts: int, rows: int, depth: int) -> list[Entry]:
    """What a file says of the parts of a matrix ``[rows, depth]`` of each expert."""
    return [Entry(DTYPES[part.dtype], (experts, *part.shape)) for part in weights.parts(rows, depth)]


def ready_of(files: Files, model: ModelNames, layer: int) -> Ready:
    """A layer's experts, by the heads of files alone.

    Raises:
        ConfigError: there is no such layer with experts, or they are in the order of another version.
        CheckpointError: a tensor is not there, or no such tensor as the format has, or not of as many experts.
    """
    names = names_in(model, layer)
    weights = MXFP4 if "exponents" in names.whole.get("w13", {}) else FP8
    wanted = [_KINDS[part] for part in weights.part_names]
    tensors = []
    for matrix in ("w13", "w2"):
        kinds = names.whole.get(matrix, {})
        if set(kinds) != set(wanted):
            raise CheckpointError(f"layer {layer}: {matrix} and what belongs to it are not there")
        tensors.append([kinds[kind] for kind in wanted])
        check_metadata(files.metadata(files.file_of(kinds["weight"])), weights)
    w13, w2 = tensors
    shape = files.entry(w13[0]).shape
    experts, rows, stored = shape if len(shape) == 3 else (0, 0, 0)
    depth = weights.depth_of(stored)
    if not (experts and rows and depth) or rows % (2 * BLOCK) or depth % BLOCK:
        sizes = f"[experts, 2 * intermediate, hidden] with sizes in multiples of {BLOCK}"
        raise CheckpointError(f"layer {layer}: {shown(w13[0], 200)} has shape {shape}; allowed: {sizes}")
    check_count(files, layer, experts)
    for part_names, matrix_shape in ((w13, (rows, depth)), (w2, (depth, rows // 2))):
        for name, entry in zip(part_names, entries_of(weights, experts, *matrix_shape), strict=True):
            found = files.entry(name)
            if found != entry:
                given = f"layer {layer}: {shown(name, 200)} is {found.dtype} {found.shape}"
                raise CheckpointError(f"{given}; allowed: {entry.dtype} {entry.shape}, to fit the others")
    return Ready(weights, experts, depth, rows // 2, (w13, w2))


def routed_of(files: Files, model: ModelNames, layer: int) -> Ready | Stored:
    """The routed experts of a layer, whichever order they are in; raises as `ready_of` and `layer_of`."""
    return ready_of(files, model, layer) if model.scheme == MEGAMOE else layer_of(files, model, layer)


def load_ready(
    files: Files, model: ModelNames, layer: int, device: torch.device, rank: int, ranks: int, weight_format: str
) -> tuple[WeightTensors, WeightTensors]:
    """Both pairs of a rank's experts, in the kernel's order and marked so.

    Raises:
        ConfigError: they are in the order of another version, or another format was asked for.
        CheckpointError: a tensor is not there, or not as the others.
    """
    found = ready_of(files, model, layer)
    if weight_format not in ("auto", found.weights.name):
        given = f"weight_format = {shown(weight_format)}"
        raise ConfigError(f"{given}; allowed: auto or {found.weights.name}, which this checkpoint holds")
    chosen = experts_of_rank(found.experts, rank, ranks)
    l1, l2 = (tuple(files.read_range(name, chosen).to(device) for name in matrix) for matrix in found.names)
    mark_transformed(l1, l2)
    return l1, l2
