"""The files of a checkpoint: which tensors there are, in which file each lies, and one tensor at a time.

A checkpoint is a folder with `model.safetensors`, or with an index and shards, and mostly a `config.json`; or a single
file. All of it comes from elsewhere: an index may name files outside of the folder, that are not there, or that hold
other tensors; files may be cut short. Each of these is one `CheckpointError` that names the file. The library
`safetensors` does the reading, and maps files into memory, so that only what is asked for is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megamoe_jit._errors import CheckpointError, ConfigError, ToolchainError
from megamoe_jit._files import read_text, stays_inside
from megamoe_jit._text import first_line, shown

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_INDEX_BYTES, _CONFIG_BYTES = 1 << 28, 1 << 22  #: a million tensors have an index of 100 MB
_ENDING = ".safetensors"
_ALLOWED = "a folder, an index (.json) or a .safetensors file of a model on this machine"
_POINTER = b"version https://git-lfs.github.com/spec/"


class Entry(NamedTuple):
    """What a file says of a tensor: dtype as safetensors calls it, and shape."""

    dtype: str
    shape: tuple[int, ...]


def library() -> Any:
    """The package safetensors; raises `ToolchainError` where it is not installed."""
    try:
        import safetensors
    except ModuleNotFoundError:
        raise ToolchainError(
            "checkpoints are read by the Python package safetensors, which is not installed; "
            "run: pip install 'safetensors>=0.6.2'"
        ) from None
    return safetensors


def place_of(name: str, path: object) -> Path:
    """The path that somebody named; raises `ConfigError` unless it is one."""
    try:
        place = Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name} = {shown(path)}; allowed: a path, as text or a pathlib.Path") from None
    if "\0" in str(place):
        raise ConfigError(f"{name} = {shown(str(place))}; allowed: a path without a NUL character")
    if path == "":  # an unset variable of a script, not the working directory
        raise ConfigError(f"{name} = ''; allowed: a path; '.' is the working directory")
    return place


def is_there(place: Path) -> bool:
    """Whether there is something by this name; raises `CheckpointError` where one may not look."""
    try:
        os.stat(place)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        raise CheckpointError(f"{shown(str(place), 200)} cannot be read: {error.strerror}") from None
    return True


def _next_step(path: Path, otherwise: str) -> str:
    """What to do about a file that cannot be read, though it is there."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return "name a path in UTF-8, which a link to the folder may have"
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would wait
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    return "it is what Git LFS leaves in a file's place: run `git lfs pull` in that folder"
    return otherwise


def read_json(path: Path, limit: int = _CONFIG_BYTES) -> dict[str, Any]:
    """What a file beside the weights says; raises `CheckpointError` where it cannot be read."""
    try:
        found = json.loads(read_text(path, limit))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{path} cannot be read: {reason}; {_next_step(path, 'fetch it again')}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return found


class Files:
    """The tensors of a checkpoint.

    Args:
        path: a folder, an index, or a safetensors file.

    Attributes:
        folder: that holds the files.
        config: what `config.json` says; empty without one.

    Raises:
        ConfigError: it is not there.
        CheckpointError: its index or configuration cannot be read.
        ToolchainError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place = place_of("path", path)
        if place.name == CONFIG:
            place = place.parent
        is_folder = os.path.isdir(place)
        if not is_folder and not is_there(place):
            raise ConfigError(f"{shown(str(place), 200)} is not there; allowed: {_ALLOWED}")
        if not is_folder and place.suffix not in (_ENDING, ".json"):
            raise ConfigError(f"{shown(str(place), 200)} is no checkpoint; allowed: {_ALLOWED}")
        library()
        self.folder = place if is_folder else place.parent
        self._opened: dict[str, Any] = {}
        self._where = self._find(place, is_folder)
        self.config = read_json(self.folder / CONFIG) if is_there(self.folder / CONFIG) else {}

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def shards(self) -> list[str]:
        """The names of the files, in the order in which the index names them."""
        return list(dict.fromkeys(self._where.values()))

    def look_into_all(self) -> None:
        """Know what files hold and the index does not name, too, as whoever loads whole files does; opens all."""
        for file in self.shards:
            for name in self._keys(file):
                self._where.setdefault(name, file)

    def _find(self, place: Path, is_folder: bool) -> dict[str, str]:
        """The file of each tensor, by the tensor's name."""
        if not is_folder and place.name.endswith(_ENDING):
            return dict.fromkeys(self._keys(place.name), place.name)
        index = _INDEX if is_folder else place.name
        if is_folder and not is_there(place / _INDEX):
            single = sorted(each.name for each in place.glob(f"*{_ENDING}"))
            if _SINGLE in single or len(single) == 1:
                name = _SINGLE if _SINGLE in single else single[0]
                return dict.fromkeys(self._keys(name), name)
            found = f"{len(single)} safetensors files" if single else "no safetensors file"
            inside = " (a folder in snapshots has them)" if (place / "snapshots").is_dir() else ""
            raise CheckpointError(f"{place} has no {_INDEX} and {found}; allowed: an index, or one file{inside}")
        return self._from_index(index)

    def _from_index(self, index: str) -> dict[str, str]:
        weight_map = read_json(self.folder / index, _INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{self.folder / index} has no weight_map; allowed: a file for each tensor")
        known = set[str]()  # tens of thousands of tensors lie in a few files
        for name, file in weight_map.items():
            if isinstance(file, str) and file in known:
                continue
            if not isinstance(file, str) or not file.endswith(_ENDING) or "\0" in file or not stays_inside(file):
                where = f"{self.folder / index}: the file of {shown(name)} is {shown(file)}"
                raise CheckpointError(f"{where}; allowed: safetensors files in that folder")
            known.add(file)
        return dict(weight_map)

    def _open(self, file: str) -> Any:
        handle = self._opened.get(file)
        if handle is not None:
            return handle
        path = self.folder / file
        try:
            if path.is_file():
                # this says why it cannot be opened: the library says of everything that it is not there
                path.open("rb").close()
                handle = library().safe_open(os.fspath(path), framework="pt", device="cpu")
        except Exception as error:  # SafetensorError, and whatever the operating system says
            reason = getattr(error, "strerror", None) or first_line(error)
            step = _next_step(path, "if it was cut short, fetch it again")
            raise CheckpointError(f"{shown(file, 200)} cannot be read: {reason}; {step}") from None
        if handle is None:
            raise CheckpointError(
                f"{shown(file, 200)} is not there; the index of {self.folder} names it: fetch it again"
            )
        self._opened[file] = handle
        return handle

    def _keys(self, file: str) -> list[str]:
        return list(self._open(file).keys())

    def metadata(self, file: str) -> dict[str, str]:
        """What a file says of itself."""
        return dict(self._open(file).metadata() or {})

    def file_of(self, name: str) -> str:
        """The file that holds a tensor."""
        if name not in self._where:
            raise CheckpointError(f"there is no tensor {shown(name, 200)} in {self.folder}")
        return self._where[name]

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor, by its file."""
        part = self._part(name)
        return Entry(str(part.get_dtype()), tuple(int(n) for n in part.get_shape()))

    def _part(self, name: str) -> Any:
        file = self.file_of(name)
        handle = self._open(file)
        try:
            return handle.get_slice(name)
        except Exception:
            raise CheckpointError(
                f"{shown(file, 200)} holds no tensor {shown(name, 200)}, but the index says so; "
                "files of another model, or exchanged for each other: fetch them again"
            ) from None

    def read(self, name: str) -> torch.Tensor:
        """A tensor in the CPU's memory, mostly mapped from its file: not to be written."""
        self._part(name)
        try:
            found: torch.Tensor = self._open(self.file_of(name)).get_tensor(name)
        except Exception as error:
            raise CheckpointError(f"{shown(name, 200)} cannot be read: {first_line(error)}") from None
        return found

    def read_range(self, name: str, chosen: range) -> torch.Tensor:
        """Of a tensor with all experts in its first dimension: some of them, without reading the others."""
        part = self._part(name)
        try:
            found: torch.Tensor = part[chosen.start : chosen.stop]
        except Exception as error:
            raise CheckpointError(f"{shown(name, 200)} cannot be read: {first_line(error)}") from None
        if found.shape[0] != len(chosen):
            raise CheckpointError(
                f"{shown(name, 200)} has {found.shape[0]} of the experts {chosen.start} to {chosen.stop - 1}"
            )
        return found
