"""`convert`: a model with its experts in another format, as safetensors files, one for each layer of experts.

Everything else is copied: so the result is a model that engines read too, but for "megamoe", whose experts are in the
kernel's order. What is finished is in `convert.json` of the result, with its digest: a conversion that was ended goes
on where it was, once what is there was found to be what it should be. The index comes last, so that half a model
cannot be taken for a whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe_jit._errors import CheckpointError, ConfigError
from megamoe_jit._files import file_sha256, read_text
from megamoe_jit._layer.marks import METADATA_KEY
from megamoe_jit._spec.checks import check_callback, check_flag
from megamoe_jit._text import first_line, shown
from megamoe_jit.checkpoints.converted import FORMATS, Layer, config_of, layers_of
from megamoe_jit.checkpoints.documents import Converted, ConvertedFile
from megamoe_jit.checkpoints.files import CONFIG, Entry, Files, place_of
from megamoe_jit.checkpoints.load import device_of
from megamoe_jit.checkpoints.stored import model_of
from megamoe_jit.checkpoints.writing import PARTIAL, alone_in, name_in, nbytes, writing

_INDEX, _STATE = "model.safetensors.index.json", "convert.json"
_STATE_BYTES = 1 << 24
#: Endings of files that are no part of the result: weights, and indices of them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_MOST_BESIDE = 64 << 20

Report = Callable[[str, str], None]  #: a file's name, and what became of it
_Jobs = dict[str, "Layer | _Others"]  #: the files of a result by name, with what writes them


@dataclass(frozen=True)
class _Others:
    """What a file of the source has beside experts; written as a `Layer` is."""

    files: Files
    entries: dict[str, Entry]

    def write(self, path: Path) -> None:
        with writing(path, self.entries, {"format": "pt"}) as file:
            for name in self.entries:
                file.put(name, self.files.read(name))


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weight_format: str,
    *,
    device: torch.device | str = "cpu",
    scheme: str | None = None,
    lossy: bool = False,
    report: Report | None = None,
) -> Converted:
    """Write a model with its routed experts in another format.

    Args:
        source: a folder with safetensors files.
        target: a folder, which is made; one in which this conversion was ended goes on.
        weight_format: "fp8", "mxfp4", or "megamoe" for the kernel's order: of FP8, or of MXFP4 where experts are that.
        device: where weights are quantised.
        scheme: as `load_experts`.
        lossy: as `load_experts`.
        report: called for each file that is done, with "written" or "verified".

    Returns:
        What was written, with digests.

    Raises:
        ConfigError: experts cannot be this format; or the target is not empty, and no result of this conversion, or
            another conversion writes into it.
        UnsupportedDeviceError: there is no such GPU here.
        OSError: the target cannot be written, as where a disk is full.
        CheckpointError: a file of the source is damaged, or one of the target is not what was written.
        ToolchainError: the package safetensors is not installed.
    """
    if not isinstance(weight_format, str) or weight_format not in FORMATS:
        raise ConfigError(f"format {shown(weight_format)} is not supported; allowed: {', '.join(FORMATS)}")
    check_callback("report", report)
    check_flag("lossy", lossy)
    files, folder = Files(source), place_of("target", target)
    if os.path.realpath(folder) == os.path.realpath(files.folder):
        raise ConfigError(f"{folder} is the source itself; allowed: another folder")
    files.look_into_all()
    model_of(files, scheme)
    layers = layers_of(files, weight_format, device_of(device), scheme, lossy)
    jobs = _jobs(files, layers)
    orders = {order for layer in layers if (order := layer.metadata().get(METADATA_KEY))}
    order = " ".join(sorted(orders)) or None
    identity = {"source": _identity(files), "format": weight_format, "lossy": lossy, "scheme": scheme, "order": order}
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder), _goes_on():
        done = _write(jobs, folder, _State(folder, identity), report)
        _finish(files, folder, layers, weight_format, jobs)
    return Converted(str(files.folder), str(folder), weight_format, tuple(done))


@contextlib.contextmanager
def _goes_on() -> Iterator[None]:
    """Say of a refusal of the operating system, as of a full disk, what to do once its reason is gone."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}; what is finished stays, and the same conversion goes on behind it"
        raise OSError(error.errno, reason, error.filename) from None


def _write(jobs: _Jobs, folder: Path, state: _State, report: Report | None) -> list[ConvertedFile]:
    """Write each file that is not there yet, and verify the others."""
    for name, job in jobs.items():
        known, path = state.files.get(name), folder / name
        if known is None:
            job.write(path)
            state.add(path)
        else:
            _verify(path, known)
        if report is not None:
            report(name, "written" if known is None else "verified")
    return [state.files[name] for name in jobs]


def _identity(files: Files) -> str:
    """A digest of what the source is: its names, and sizes and times of its files."""
    parts: list[object] = [sorted(files)]
    for name in files.shards:
        try:
            status = os.stat(files.folder / name)
        except OSError as error:
            raise CheckpointError(f"{shown(name, 200)} cannot be read: {error.strerror}") from None
        parts.append([name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _State:
    """What is finished, in a file of the result."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self._path, self._job = folder / _STATE, job
        self.files: dict[str, ConvertedFile] = {}
        there = [name for name in os.listdir(folder) if not name.endswith(PARTIAL)]
        if there and _STATE not in there:
            raise ConfigError(f"{folder} is not empty; allowed: a new folder, or one of this conversion")
        if there:
            self.files = self._read()
        else:  # at once: whatever ends it before its first file is entered, the folder is one of this conversion
            self._save()
        for name in os.listdir(folder):
            if name.endswith(PARTIAL):  # of a conversion that was ended
                (folder / name).unlink()

    def _save(self) -> None:
        files = {name: {"bytes": each.bytes, "sha256": each.sha256} for name, each in self.files.items()}
        _write_json(self._path, {**self._job, "files": files})

    def _read(self) -> dict[str, ConvertedFile]:
        try:
            found = json.loads(read_text(self._path, _STATE_BYTES))
            found = {"scheme": None, "order": None, **found}  # which older versions did not enter
            job, files = {name: found[name] for name in self._job}, found["files"].items()
            files = {name: ConvertedFile(name, int(e["bytes"]), str(e["sha256"])) for name, e in files}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self._path} cannot be read: {first_line(error)}; remove the folder") from None
        if job != self._job:
            different = ", ".join(name for name in job if job[name] != self._job[name])
            raise ConfigError(f"{self._path} is of a conversion with another {different}; allowed: a new folder")
        return files

    def add(self, path: Path) -> None:
        """Enter a finished file."""
        self.files[path.name] = _as_it_is(path)
        self._save()


def _write_json(path: Path, content: object) -> None:
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        name_in(error, path)
        raise


def _as_it_is(path: Path) -> ConvertedFile:
    return ConvertedFile(path.name, path.stat().st_size, file_sha256(path))


def _verify(path: Path, known: ConvertedFile) -> None:
    try:
        found = _as_it_is(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; remove the folder") from None
    if found != known:
        raise CheckpointError(f"{path} is not what was written (SHA-256 {found.sha256}); remove the folder")


def _jobs(files: Files, layers: list[Layer]) -> _Jobs:
    """The files of the result: those of experts, then what else each file of the source has.

    Raises:
        ConfigError: a tensor cannot be copied.
        CheckpointError: one is not there.
    """
    jobs: _Jobs = {f"experts-{number:05}.safetensors": layer for number, layer in enumerate(layers)}
    taken = {name for layer in layers for name in layer.taken}
    rest: dict[str, dict[str, Entry]] = {shard: {} for shard in files.shards}
    for name in files:
        if name not in taken:
            rest[files.file_of(name)][name] = files.entry(name)
    for number, entries in enumerate(rest.values()):
        for name, entry in entries.items():
            nbytes(name, entry)
        if entries:
            jobs[f"others-{number:05}.safetensors"] = _Others(files, entries)
    return jobs


def _finish(files: Files, folder: Path, layers: list[Layer], weight_format: str, jobs: _Jobs) -> None:
    """The small files that belong to a model, its configuration, and the index."""
    for path in files.folder.iterdir():
        belongs = not path.name.startswith(".") and not path.name.endswith((*_WEIGHTS, PARTIAL))
        if belongs and path.name not in (CONFIG, _STATE) and path.is_file() and path.stat().st_size <= _MOST_BESIDE:
            shutil.copyfile(path, folder / path.name)
    _write_json(folder / CONFIG, config_of(files, layers, weight_format))
    weight_map = {tensor: name for name, job in jobs.items() for tensor in job.entries}
    size = sum((folder / name).stat().st_size for name in jobs)
    _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
