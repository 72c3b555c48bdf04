"""`load_experts`: the experts of one layer and one rank, from files to two matrices that `MegaMoE` takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from megamoe_jit._errors import ConfigError, UnsupportedDeviceError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._spec.checks import check_callback
from megamoe_jit._text import counted, shown
from megamoe_jit.checkpoints.convert_weights import Target, target_of
from megamoe_jit.checkpoints.files import Files
from megamoe_jit.checkpoints.names import MEGAMOE
from megamoe_jit.checkpoints.ready import load_ready, ready_of
from megamoe_jit.checkpoints.stored import Stored, experts_of_rank, layer_of, model_of, shared_of

__all__ = ["Progress", "device_of", "load_experts", "load_shared_experts"]

Progress = Callable[[int, int], None]  #: called with experts that are done, and how many there are


def device_of(device: torch.device | str) -> torch.device:
    """Where weights are made.

    Raises:
        ConfigError: it is no device that weights can be made on.
        UnsupportedDeviceError: there is no such GPU here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        given = str(device) if isinstance(device, torch.device) else device
        raise ConfigError(f"device = {shown(given)}; allowed: cpu, or cuda with the number of a GPU")
    count = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        seen = counted(count, "GPU")
        allowed = "a GPU, or cpu for weights alone: a layer needs a Hopper GPU; `megamoe-jit doctor` says more"
        raise UnsupportedDeviceError(f"device {found} is not here, where torch sees {seen}; allowed: {allowed}")
    return found


def load_experts(
    path: str | os.PathLike[str],
    layer: int,
    *,
    device: torch.device | str,
    rank: int = 0,
    ranks: int = 1,
    weight_format: str = "auto",
    scheme: str | None = None,
    lossy: bool = False,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Read the routed experts of one layer, those of one rank alone, one expert at a time.

    Args:
        path: a folder with safetensors files, an index of them, or one such file.
        layer: its number in the names of tensors.
        device: where the result is made. Beside it there is one expert at a time.
        rank: whose experts: an equal part, in the order of their numbers.
        ranks: that share the experts.
        weight_format: of the result. "auto" keeps FP8 and MXFP4 as they are and makes FP8 of values; "fp8" and "mxfp4"
            make that; "bf16" gives values.
        scheme: how tensors are named, where it cannot be told from the names.
        lossy: also take what has to be quantised again with a loss: FP8 with a scale for each row, MXFP4 of FP8, and
            FP8 of MXFP4 where a block of 128 x 128 spans more than FP8 has.
        progress: called with the experts that are done and their number.

    Returns:
        `w13` ``[experts / ranks, 2I, H]``, gate rows first, and `w2` ``[experts / ranks, H, I]``, each as `MegaMoE`
        takes it: pairs of codes and scales, or bf16 values. Pairs of a checkpoint in the kernel's order are marked so.

    Raises:
        ConfigError: an argument is wrong, or the experts cannot be this layer; says why.
        CheckpointError: a file is not there, damaged, or does not hold what the index says.
        UnsupportedDeviceError: there is no such GPU here.
        ToolchainError: the package safetensors is not installed.
    """
    check_callback("progress", progress)
    files = Files(path)
    model = model_of(files, scheme)
    if model.scheme == MEGAMOE:
        return load_ready(files, model, layer, device_of(device), rank, ranks, weight_format)
    stored = layer_of(files, model, layer)
    chosen = experts_of_rank(stored.experts, rank, ranks)
    target = target_of(weight_format, stored.kind, lossy)
    return read_experts(stored, chosen, target, device_of(device), progress)


@torch.no_grad()
def read_experts(
    stored: Stored, chosen: range, target: Target, device: torch.device, progress: Progress | None = None
) -> tuple[Any, Any]:
    """Both matrices of some experts, made on a device and filled one expert at a time."""
    width, hidden = stored.intermediate, stored.hidden
    made = [
        [torch.empty((len(chosen), *shape), dtype=dtype, device=device) for dtype, shape in target.parts(rows, depth)]
        for rows, depth in ((2 * width, hidden), (hidden, width))
    ]
    for place, expert in enumerate(chosen):
        first = ("gate_up",) if stored.fused else ("gate", "up")
        for tensors, parts in zip(made, (first, ("down",)), strict=True):
            row = [0] * len(tensors)
            for part in parts:
                for i, piece in enumerate(_converted(stored, expert, part, target, device)):
                    whole = _bytes_of(tensors[i][place])
                    whole[row[i] : row[i] + piece.shape[0]].copy_(_bytes_of(piece))
                    row[i] += piece.shape[0]
        if progress is not None:
            progress(place + 1, len(chosen))
    w13, w2 = (tensors[0] if len(tensors) == 1 else tuple(tensors) for tensors in made)
    return w13, w2


def _converted(stored: Stored, expert: int, part: str, target: Target, device: torch.device) -> list[torch.Tensor]:
    """A part of an expert as the target has it; what cannot be that is said with its place."""
    matrix = stored.read(expert, part)
    try:
        return target.convert(matrix, device)
    except ConfigError as error:
        raise ConfigError(f"{stored.what}, expert {expert}, {part}: {error}") from None


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Types of one byte as bytes, which every device can copy."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def load_shared_experts(
    path: str | os.PathLike[str],
    layer: int,
    *,
    device: torch.device | str,
    weight_format: str = "auto",
    scheme: str | None = None,
    lossy: bool = False,
) -> tuple[WeightTensors, WeightTensors] | None:
    """Read the shared experts of a layer: one that is n times as wide as the routed ones becomes n of their sizes.

    Args:
        path, layer, device, weight_format, scheme, lossy: as `load_experts`.

    Returns:
        `shared_w13` and `shared_w2` as `MegaMoE` takes them; None if the layer has no shared expert.

    Raises:
        ConfigError: as `load_experts`, or its width is no multiple of that of routed experts.
        MegaMoeError: as `load_experts`.
    """
    files = Files(path)
    model = model_of(files, scheme)
    shared = shared_of(files, model, layer)
    if shared is None:
        return None
    if model.scheme == MEGAMOE:
        ready = ready_of(files, model.layers[layer], layer)
        hidden, intermediate = ready.hidden, ready.intermediate
    else:
        routed = layer_of(files, model, layer)
        hidden, intermediate = routed.hidden, routed.intermediate
    count, rest = divmod(shared.intermediate, intermediate)
    if rest or shared.hidden != hidden:
        sizes = f"{shared.hidden} and {shared.intermediate}, routed ones' {hidden} and {intermediate}"
        raise ConfigError(f"sizes of the shared expert of layer {layer} are {sizes}; allowed: a multiple in width")
    target = target_of(weight_format, shared.kind, lossy)
    w13, w2 = read_experts(shared, range(1), target, device_of(device))
    return _split(w13, count, 1), _split(w2, count, 2)


def _split(matrix: Any, count: int, dim: int) -> Any:
    """One wide expert as `count` of the routed ones' width; gate and up rows keep together."""
    if isinstance(matrix, tuple):
        return tuple(_split(each, count, dim) for each in matrix)
    whole = matrix[0]
    if dim == 1:
        _, depth = whole.shape
        return whole.reshape(2, count, -1, depth).transpose(0, 1).reshape(count, -1, depth).contiguous()
    return whole.reshape(whole.shape[0], count, -1).transpose(0, 1).contiguous()
