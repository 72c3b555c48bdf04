"""The experts of one layer as a checkpoint stores them: in which kind, of which sizes, one expert at a time.

What tensors are is told by their dtypes and shapes, which files cannot say wrongly; what `config.json` says beside can
only refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from megamoe_jit._errors import CheckpointError, ConfigError
from megamoe_jit._spec import BLOCK, check_int
from megamoe_jit._spec.formats import MXFP4
from megamoe_jit._text import counted, shown
from megamoe_jit.checkpoints.config import experts_of, refusal
from megamoe_jit.checkpoints.files import Entry, Files
from megamoe_jit.checkpoints.names import FUSED, MEGAMOE, LayerNames, ModelNames, Parts, all_names_of

if TYPE_CHECKING:
    import torch


class Kind(StrEnum):
    """How weights are stored."""

    VALUES = "values"  #: bf16, float16 or float32
    FP8 = "fp8"  #: e4m3 with a scale for 128 x 128
    FP8_TENSOR = "fp8-tensor"  #: e4m3 with one scale
    FP8_CHANNEL = "fp8-channel"  #: e4m3 with a scale for each row
    MXFP4 = "mxfp4"  #: pairs of e2m1 with an exponent for 32 columns


_FLOATS = ("BF16", "F16", "F32")
_BYTES = ("I8", "U8")
_WHY_NOT = {
    "weight_packed": "are packed (INT4 or NVFP4); the layer reads FP8, MXFP4 or values: take an FP8 release",
    "qweight": "are packed integers; the layer reads FP8, MXFP4 or values",
    "bias": "have biases, which the layer does not add",
    "blocks": "are MXFP4 as gpt-oss has it, with biases and an alpha in SwiGLU, which the layer does not compute",
}


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One part of an expert as it is read.

    Attributes:
        kind: what it is.
        codes: ``[rows, columns]``; of MXFP4 ``[rows, columns / 2]``.
        scales: as stored; None of values.
    """

    kind: Kind
    codes: torch.Tensor
    scales: torch.Tensor | None


class Stored:
    """Experts of a layer, or its shared one.

    Attributes:
        what: for messages.
        kind: how all of them are stored.
        experts: their number.
        hidden, intermediate: sizes.
        fused: gate and up are one matrix, and all experts one tensor.
    """

    def __init__(self, files: Files, what: str, parts: Mapping[int, Parts] | Parts, fused: bool) -> None:
        self.what, self.fused = what, fused
        self._files = files
        self._parts: Mapping[int, Parts] = {0: parts} if fused else parts  # type: ignore[dict-item, assignment]
        first = self._parts[min(self._parts)]
        names = ("gate_up", "down") if fused else ("gate", "up", "down")
        for part in names:
            self._check_kinds(part, first.get(part, {}))
        looked = {part: self._look(first[part]) for part in names}
        kinds = {kind for kind, _ in looked.values()}
        if len(kinds) > 1:
            raise ConfigError(f"{what}: parts of an expert are stored as {', '.join(sorted(kinds))}; allowed: one kind")
        self.kind = kinds.pop()
        rows, hidden = looked[names[0]][1]
        self.hidden, self.intermediate = hidden, rows // 2 if fused else rows
        wanted = {"gate_up": (2 * self.intermediate, hidden), "down": (hidden, self.intermediate)}
        self._shapes = {part: wanted.get(part, (self.intermediate, hidden)) for part in names}
        if fused and looked["down"][1] == (hidden // 2, rows):
            raise ConfigError(
                f"{what}: its matrices are stored the other way round, [experts, hidden, 2 * intermediate], as Llama 4 "
                "and Qwen3-VL-MoE have them; allowed: [experts, 2 * intermediate, hidden], or a tensor for each expert"
            )
        for part, (_, shape) in looked.items():
            if shape != self._shapes[part]:
                raise CheckpointError(f"{what}: {part} is {shape}; allowed: {self._shapes[part]}, to fit the others")
        if not hidden or not self.intermediate or hidden % BLOCK or self.intermediate % BLOCK:
            raise ConfigError(
                f"{what}: hidden size {hidden} and intermediate size {self.intermediate}; "
                f"allowed: multiples of {BLOCK}, which the kernel's blocks are"
            )
        self.experts = self._count(first) if fused else len(self._parts)

    def _count(self, parts: Parts) -> int:
        """Experts of tensors that hold all of them; raises unless each of them holds as many."""
        names = [kinds[kind] for kinds in parts.values() for kind in ("weight", "scale") if kind in kinds]
        counts = {name: (self._files.entry(name).shape or (0,))[0] for name in names}
        most = max(counts.values())
        for name, count in counts.items():
            if not count or count != most:
                allowed = f"{most}, as others of the layer" if most else "one at least"
                raise CheckpointError(
                    f"{self.what}: {shown(name, 200)} has {counted(count, 'expert')}; allowed: {allowed}"
                )
        return most

    def _check_kinds(self, part: str, kinds: Mapping[str, str], whose: str = "") -> None:
        for kind, why in _WHY_NOT.items():
            if kind in kinds:
                raise ConfigError(f"{self.what}: weights of {shown(kinds[kind], 200)} {why}")
        if "weight" not in kinds:
            raise CheckpointError(f"{self.what}: there is no weight of {part}{whose}")

    def _look(self, kinds: Mapping[str, str]) -> tuple[Kind, tuple[int, int]]:
        """The kind of one part, and rows and columns of its values."""
        weight = self._one(kinds["weight"])
        scale = self._one(kinds["scale"]) if "scale" in kinds else None
        return _kind_of(f"{self.what}: {shown(kinds['weight'], 200)}", weight, scale)

    def _one(self, name: str) -> Entry:
        """Dtype and shape of one expert's part of a tensor."""
        found = self._files.entry(name)
        return Entry(found.dtype, found.shape[1:]) if self.fused else found

    def read(self, expert: int, part: str) -> StoredMatrix:
        """A part of an expert: gate, up or down; gate_up instead of the first two where it is fused.

        Raises:
            CheckpointError: it is not there, or is no such matrix as those of the first expert.
        """
        kinds = self._names(expert, part)
        scales = None if self.kind is Kind.VALUES else self._tensor(kinds["scale"], expert)
        return StoredMatrix(self.kind, self._tensor(kinds["weight"], expert), scales)

    def check(self) -> None:
        """Look at every expert, in the heads of files alone; raises what `read` would."""
        for expert in self._parts:
            for part in self._shapes:
                self._names(expert, part)

    def _names(self, expert: int, part: str) -> Mapping[str, str]:
        """Names of the tensors of a part, by kind."""
        kinds = self._parts[0 if self.fused else expert].get(part, {})
        if not self.fused:
            self._check_kinds(part, kinds, f" of expert {expert}")
            kind, shape = self._look(kinds)
            if (kind, shape) != (self.kind, self._shapes[part]):
                raise CheckpointError(
                    f"{self.what}: {shown(kinds['weight'], 200)} is {kind} {shape}; "
                    f"allowed: {self.kind} {self._shapes[part]}, as those of the first expert"
                )
        return kinds

    def _tensor(self, name: str, expert: int) -> torch.Tensor:
        return self._files.read_range(name, range(expert, expert + 1))[0] if self.fused else self._files.read(name)


def _kind_of(what: str, weight: Entry, scale: Entry | None) -> tuple[Kind, tuple[int, int]]:
    """How a matrix is stored, by dtypes and shapes alone, and its sizes."""
    if len(weight.shape) != 2:
        raise ConfigError(f"{what} has shape {weight.shape}; allowed: [rows, columns]")
    rows, columns = weight.shape
    if weight.dtype in _FLOATS and scale is None:
        return Kind.VALUES, (rows, columns)
    if weight.dtype == "F8_E4M3" and scale is not None:
        return _fp8_kind(what, (rows, columns), scale), (rows, columns)
    if weight.dtype in _BYTES and scale is not None and scale.dtype in ("F8_E8M0", "U8"):
        if scale.shape == (rows, 2 * columns // MXFP4.group):
            return Kind.MXFP4, (rows, 2 * columns)
        where = f"{what} is {weight.dtype} {weight.shape} with exponents {scale.shape}"
        raise ConfigError(f"{where}; allowed: two values in a byte, an exponent for {MXFP4.group} of a row")
    given = f"{what} is {weight.dtype}" + (f" with scales {scale.dtype} {scale.shape}" if scale else " without scales")
    raise ConfigError(f"{given}; allowed: bf16, float16 or float32 alone, e4m3 or MXFP4 with scales")


def _fp8_kind(what: str, shape: tuple[int, int], scale: Entry) -> Kind:
    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    if scale.dtype not in (*_FLOATS, "F8_E8M0", "U8"):
        raise ConfigError(f"{what} has scales of {scale.dtype}; allowed: float32, bf16, float16 or e8m0")
    if scale.shape == blocks:
        return Kind.FP8
    if all(n == 1 for n in scale.shape):
        return Kind.FP8_TENSOR
    if scale.shape in ((shape[0], 1), (shape[0],)):
        return Kind.FP8_CHANNEL
    raise ConfigError(f"{what} has scales {scale.shape}; allowed: {blocks}, one for {BLOCK} x {BLOCK}")


def model_of(files: Files, scheme: str | None = None) -> ModelNames:
    """What a checkpoint has of the model; raises `ConfigError` with the reason where it cannot be this layer's."""
    why = refusal(files.config)
    if why:
        raise ConfigError(f"{files.folder.name}: {why}")
    return all_names_of(files, scheme)[0]


def layer_of(files: Files, model: ModelNames, layer: int) -> Stored:
    """The routed experts of a layer.

    Raises:
        ConfigError: there is no such layer with experts, or they are stored in a way that cannot be used.
        CheckpointError: some of them are not there.
    """
    names = names_in(model, layer)
    what = f"layer {layer}"
    if model.scheme == MEGAMOE:
        raise ConfigError(f"{what} is in the kernel's order; allowed here: plain weights")
    if model.scheme == FUSED:
        found = Stored(files, what, names.whole, fused=True)
    else:
        missing = set(range(max(names.experts) + 1)).difference(names.experts)
        if missing:
            raise CheckpointError(f"{what}: expert {min(missing)} of {max(names.experts) + 1} is not there")
        found = Stored(files, what, names.experts, fused=False)
    check_count(files, layer, found.experts)
    return found


def check_count(files: Files, layer: int, experts: int) -> None:
    """Raise `CheckpointError` unless a layer has as many experts as the configuration says, if it does."""
    said = experts_of(files.config)
    if said is not None and said != experts:
        raise CheckpointError(f"layer {layer} has {experts} experts; allowed: {said}, as config.json says")


def shared_of(files: Files, model: ModelNames, layer: int) -> Stored | None:
    """The shared expert of a layer; None if it has none."""
    names = names_in(model, layer)
    return Stored(files, f"shared expert of layer {layer}", {0: names.shared}, fused=False) if names.shared else None


def names_in(model: ModelNames, layer: int) -> LayerNames:
    """The names of a layer's tensors; raises `ConfigError` where it has no experts."""
    found = model.layers.get(layer) if isinstance(layer, int) and not isinstance(layer, bool) else None
    if found is None:
        there = sorted(model.layers)
        span = f"{there[0]} to {there[-1]}" if len(there) == there[-1] - there[0] + 1 else shown(there)
        raise ConfigError(f"layer {shown(layer)} has no experts in this checkpoint; allowed: {span}")
    return found


def experts_of_rank(experts: int, rank: int, ranks: int) -> range:
    """The numbers of a rank's experts."""
    check_int("rank", rank)
    check_int("ranks", ranks)
    if ranks < 1 or experts % ranks or not 0 <= rank < ranks:
        raise ConfigError(
            f"rank = {shown(rank)} of {shown(ranks)} with {experts} experts; allowed: equal parts of them"
        )
    local = experts // ranks
    return range(rank * local, (rank + 1) * local)
