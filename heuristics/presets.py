"""Model shapes known by name (``presets.toml``), and the parser for ``--shapes``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._files import read_toml
from megamoe_jit._spec import MAX_RANKS, MoEShape
from megamoe_jit._text import shown

__all__ = ["Preset", "parse_shapes", "preset", "preset_names"]

_FILE = Path(__file__).with_name("presets.toml")
_OR_A_FILE = ", or a .toml file"
_OR_A_MODEL = ", a .toml file, or a model's folder or config.json"
_SIZES = ("hidden", "intermediate", "experts", "topk")
_TYPES = {int: "an integer", str: "a string", list: "a list of strings"}
_OPTIONAL = {"shared": int, "source": str, "ranks": int, "ranks_why": str, "config": str, "differs": list, "note": str}


@dataclass(frozen=True, slots=True)
class Preset:
    """One MoE layer as a model has it, and the number of GPUs its experts are usually spread over."""

    name: str
    shape: MoEShape
    ranks: int
    source: str
    config: str | None = None  #: configuration class in transformers
    differs: tuple[str, ...] = ()  #: sizes in which the model is not the default of that class
    shared: int = 0  #: shared experts of the model, of the sizes of the others; `shape` is without them

    @property
    def local_experts(self) -> int:
        """Experts of one rank."""
        return self.shape.experts // self.ranks


def _build(name: str, data: dict[str, Any], where: str) -> Preset:
    unknown = sorted(set(data) - set(_SIZES) - set(_OPTIONAL))
    if unknown:
        allowed = ", ".join((*_SIZES, *_OPTIONAL))
        raise ConfigError(f"{where}: [{name}] has unknown key {shown(unknown[0])}; allowed: {allowed}")
    for key, kind in {**dict.fromkeys(_SIZES, int), **_OPTIONAL}.items():
        if key in _SIZES and key not in data:
            raise ConfigError(f"{where}: [{name}] has no {key}; needed: {', '.join(_SIZES)}")
        value = data.get(key, kind())
        if type(value) is not kind or (isinstance(value, list) and not all(isinstance(part, str) for part in value)):
            raise ConfigError(f"{where}: [{name}] {key} = {shown(value)}; allowed: {_TYPES[kind]}")
    try:
        shape, shared = MoEShape(*(data[key] for key in _SIZES)), data.get("shared", 0)
        replace(shape, shared=shared)  # raises unless a kernel can have as many
    except ConfigError as error:
        raise ConfigError(f"{where}: [{name}] {error}") from None
    ranks: int = data.get("ranks", 1)
    if not 1 <= ranks <= MAX_RANKS or shape.experts % ranks:
        raise ConfigError(
            f"{where}: [{name}] ranks = {ranks}; allowed: 1 to {MAX_RANKS}, a divisor of {shape.experts} experts"
        )
    return Preset(
        name, shape, ranks, data.get("source", where), data.get("config"), tuple(data.get("differs", ())), shared
    )


def _read(path: Path) -> dict[str, Preset]:
    try:
        tables = read_toml(path)
    except OSError as error:
        raise ConfigError(f"cannot read shapes from {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for name, data in tables.items():
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: {name} = {shown(data)}; allowed: one [name] table per shape")
    if not tables:
        raise ConfigError(f"{path} names no shape; allowed: one [name] table per shape")
    return {name: _build(name, data, path.name) for name, data in tables.items()}


@cache
def _presets() -> dict[str, Preset]:
    return _read(_FILE)


def preset_names() -> tuple[str, ...]:
    """Names of all presets, in the order of the file."""
    return tuple(_presets())


def preset(name: str) -> Preset:
    """The preset called `name`; raises `ConfigError` with the names there are."""
    return _named(name, "")


def _named(name: str, more: str) -> Preset:
    known = _presets()
    if not isinstance(name, str):
        raise ConfigError(f"name = {shown(name)} is not supported; allowed: {', '.join(known)}")
    if name in known:
        return known[name]
    models = ((part, each.name) for each in known.values() for part in re.split("[,;]", each.source))
    called = {word.strip().casefold(): each for word, each in (*models, *zip(known, known, strict=True))}
    close = get_close_matches(name.rpartition("/")[2].casefold(), called, n=1)
    hint = f"did you mean {called[close[0]]!r}? " if close else ""
    raise ConfigError(f"unknown shape {shown(name)}; {hint}allowed: {', '.join(known)}{more}")


def parse_shapes(text: str, model: Callable[[str], Preset] | None = None) -> tuple[Preset, ...]:
    """Read a ``--shapes`` value.

    Args:
        text: Comma-separated preset names, ``all``, or paths of ``.toml`` files laid out like
            ``presets.toml``; with `model`, of folders and ``.json`` files too.
        model: What reads the layer of a model from its folder or configuration. A preset's name is never such a path.

    Returns:
        The shapes in the order they were named, each once.

    Raises:
        ConfigError: A name is unknown or means two shapes, or a file cannot be read or is not in order.
    """
    if not isinstance(text, str):
        raise ConfigError(f"shapes = {shown(text)} is not supported; allowed: names and .toml files in one string")
    more = _OR_A_FILE if model is None else _OR_A_MODEL
    found: dict[str, tuple[Preset, str]] = {}
    for item in (part.strip() for part in text.split(",")):
        if not item:
            continue
        where = item
        if item == "all":
            shapes, where = [*_presets().values()], "`shapes ls`"
        elif item.endswith(".toml"):
            shapes = [*_read(Path(item)).values()]
        elif model is not None and item not in _presets() and _may_be_a_model(item):
            shapes = [model(item)]
        else:
            shapes, where = [_named(item, more)], "`shapes ls`"
        for shape in shapes:
            before, place = found.setdefault(shape.name, (shape, where))
            if _sizes(before) != _sizes(shape):
                raise ConfigError(
                    f"shape {shape.name!r} is given twice with other sizes: {_sizes(before)} in {place}, "
                    f"{_sizes(shape)} in {where}; rename one"
                )
    if not found:
        raise ConfigError(f"no shape in {text!r}; allowed: {', '.join(_presets())}{more}")
    return tuple(shape for shape, _ in found.values())


def _may_be_a_model(item: str) -> bool:
    """Whether it is a path as models have them; that of a folder must be there, since it looks like a name."""
    return item.endswith(".json") or ("\0" not in item and os.path.isdir(item))


def _sizes(entry: Preset) -> str:
    shape = entry.shape
    sizes = f"{shape.hidden}/{shape.intermediate}/{shape.experts}/{shape.topk}"
    return sizes if entry.ranks == 1 else f"{sizes} on {entry.ranks} ranks"
