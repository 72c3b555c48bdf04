"""`inspect`: what is in a checkpoint, whether it can be used, and what it takes; nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from megamoe_jit._errors import CheckpointError, ConfigError
from megamoe_jit._layer.from_mxfp4 import mxfp4_spread
from megamoe_jit._spec import check_int
from megamoe_jit._spec.formats import FP8, MXFP4
from megamoe_jit._text import first_line
from megamoe_jit.checkpoints.config import clamp_of, topk_of
from megamoe_jit.checkpoints.convert_weights import scales_of, target_of
from megamoe_jit.checkpoints.documents import CheckpointLayer, InspectedCheckpoint, Spread
from megamoe_jit.checkpoints.files import Files
from megamoe_jit.checkpoints.names import ModelNames
from megamoe_jit.checkpoints.ready import Ready, routed_of
from megamoe_jit.checkpoints.stored import Kind, Stored, experts_of_rank, model_of, shared_of

_REFUSED = (ConfigError, CheckpointError)


def inspect(
    path: str | os.PathLike[str], *, ranks: int = 1, experts: int = 1, scheme: str | None = None
) -> InspectedCheckpoint:
    """Look at a model's checkpoint.

    Args:
        path: a folder, an index or a file.
        ranks: that will share the experts.
        experts: of each layer whose exponents are looked at, which reads them; 0 for none.
        scheme: as `load_experts`.

    Returns:
        What is there.

    Raises:
        ConfigError: it is not there, or a number is none.
        CheckpointError: its index cannot be read.
        ToolchainError: the package safetensors is not installed.
    """
    files = Files(path)
    check_int("ranks", ranks)
    check_int("experts", experts)
    head: dict[str, Any] = {"path": str(path), "tensors": len(files), "files": len(files.shards), "ranks": ranks}
    said = files.config.get("model_type")
    model_type = said if isinstance(said, str) else None
    try:
        model = model_of(files, scheme)
        clamp = clamp_of(files.config)
    except _REFUSED as error:
        head |= {"problem": str(error), "model_type": model_type}
        return InspectedCheckpoint(**head, usable=False, layers=(), bytes_per_rank=0)
    layers = tuple(_layers(files, model, ranks, experts))
    return InspectedCheckpoint(
        **head,
        usable=all(layer.usable for layer in layers),
        layers=layers,
        bytes_per_rank=sum(layer.bytes_per_rank or 0 for layer in layers),
        model_type=model_type,
        scheme=model.scheme,
        topk=topk_of(files.config),
        clamp=clamp,
    )


def _layers(files: Files, model: ModelNames, ranks: int, experts: int) -> Iterator[CheckpointLayer]:
    for number in model.layers:
        try:
            yield _layer(files, model, number, ranks, experts)
        except _REFUSED as error:
            yield CheckpointLayer(number, False, first_line(error))


def _layer(files: Files, model: ModelNames, number: int, ranks: int, experts: int) -> CheckpointLayer:
    found = routed_of(files, model, number)
    if isinstance(found, Stored):
        found.check()
    local = len(experts_of_rank(found.experts, 0, ranks))
    if isinstance(found, Ready):
        weights, kind = found.weights, f"{found.weights.name}, in the kernel's order"
        more: dict[str, Any] = {"usable": True}
    else:
        weights, kind = MXFP4 if found.kind is Kind.MXFP4 else FP8, str(found.kind)
        more = {**_usable(found), "spread": _spread(found, min(experts, found.experts)) if experts > 0 else None}
    return CheckpointLayer(
        number,
        kind=kind,
        experts=found.experts,
        hidden=found.hidden,
        intermediate=found.intermediate,
        **_shared(files, model, number, found.intermediate),
        bytes_per_rank=local * weights.expert_bytes(found.hidden, found.intermediate),
        **more,
    )


def _shared(files: Files, model: ModelNames, number: int, intermediate: int) -> dict[str, Any]:
    """What is said of a layer's shared experts."""
    found = shared_of(files, model, number)
    return {} if found is None else {"shared": str(found.kind), "shared_experts": found.intermediate // intermediate}


def _usable(stored: Stored) -> dict[str, Any]:
    try:
        target_of("auto", stored.kind, False)
    except ConfigError as error:
        return {"usable": False, "problem": str(error)}
    return {"usable": True}


def _spread(stored: Stored, count: int) -> Spread | None:
    """Of the first experts; None of values, and of scales that are all 0, which have no exponents."""
    if stored.kind is Kind.VALUES:
        return None
    least, most, found = 1 << 10, -(1 << 10), []
    for expert in range(count):
        for part in ("gate_up", "down") if stored.fused else ("gate", "up", "down"):
            matrix = stored.read(expert, part)
            assert matrix.scales is not None
            exponents = _exponents(f"{stored.what}, expert {expert}, {part}", matrix.scales)
            if exponents.numel():
                least, most = min(least, int(exponents.min())), max(most, int(exponents.max()))
            if stored.kind is Kind.MXFP4:
                found.append(mxfp4_spread(matrix.codes, matrix.scales))
    if not found:
        return Spread(count, least, most) if least <= most else None
    exact = {name: sum(each.exact[name] for each in found) for name in ("mxfp4", "e4m3")}
    blocks, binades = sum(each.blocks for each in found), max(each.binades for each in found)
    return Spread(count, least, most, binades, blocks, exact["mxfp4"], exact["e4m3"])


def _exponents(what: str, stored: torch.Tensor) -> torch.Tensor:
    """Those of a part's scales, without scales of 0; raises `ConfigError` where a scale is no number."""
    scales = scales_of(stored).flatten()
    wrong = scales[~scales.isfinite()]
    if wrong.numel():
        raise ConfigError(f"{what}: {wrong.numel()} scales are {float(wrong[0])}, and so would be the results")
    return torch.frexp(scales[scales != 0])[1] - 1
