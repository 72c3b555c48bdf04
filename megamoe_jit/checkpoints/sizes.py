"""`model_shape`: the layer of a model by its `config.json` alone; neither weights nor safetensors need be there."""

from __future__ import annotations

import os
from typing import NamedTuple

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape
from megamoe_jit._text import shown
from megamoe_jit.checkpoints.config import refusal, sizes_of, weight_format_of
from megamoe_jit.checkpoints.files import CONFIG, is_there, place_of, read_json


class ModelShape(NamedTuple):
    """The layer of a model: what it is called, its sizes without shared experts, and the format of its experts."""

    name: str
    shape: MoEShape
    weight_format: str


def model_shape(path: str) -> ModelShape:
    """The routed experts of a model, as its configuration says.

    Args:
        path: its folder, or its `config.json`.

    Raises:
        ConfigError: there is none, or the experts cannot be this layer; says why.
        CheckpointError: it cannot be read.
    """
    place = place_of("path", path)
    file = place / CONFIG if os.path.isdir(place) else place
    if not is_there(file):
        allowed = f"the folder of a model with its {CONFIG}, or that file"
        raise ConfigError(f"{shown(str(file), 200)} is not there; allowed: {allowed}")
    config = read_json(file)
    folder = os.path.realpath(file.parent)  # of the file's own name: a hub's cache has it as a link to blobs/HASH
    name = os.path.basename(folder) if file.name == CONFIG else file.stem
    why = refusal(config)
    if why:
        raise ConfigError(f"{file}: {why}")
    try:
        return ModelShape(name, MoEShape(**sizes_of(config)), weight_format_of(config))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
