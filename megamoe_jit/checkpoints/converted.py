"""One layer's experts in the format that they are converted to: which tensors there will be, and their bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.marks import METADATA_KEY, layout_of
from megamoe_jit._layer.weights import transform_weights_for_mega_moe_sm90
from megamoe_jit._spec.formats import FP8, MXFP4, WeightFormat
from megamoe_jit.checkpoints.config import text_of
from megamoe_jit.checkpoints.convert_weights import Target, target_of
from megamoe_jit.checkpoints.files import Entry, Files
from megamoe_jit.checkpoints.load import read_experts
from megamoe_jit.checkpoints.names import FUSED, SCHEMES, LayerNames, ModelNames, Scheme, all_names_of
from megamoe_jit.checkpoints.ready import DTYPES, entries_of
from megamoe_jit.checkpoints.stored import Kind, Stored, layer_of
from megamoe_jit.checkpoints.writing import Writer, writing

FORMATS = ("fp8", "mxfp4", "megamoe")


class Layer(ABC):
    """A layer of the result.

    Attributes:
        entries: of its file.
        taken: names of the source's tensors that it replaces.
        stored: what is read.
    """

    entries: dict[str, Entry]

    def __init__(self, stored: Stored, names: LayerNames, target: Target, device: torch.device) -> None:
        self.stored, self._target, self._device = stored, target, device
        parts = [*names.experts.values(), names.whole]
        self.taken = [name for each in parts for kinds in each.values() for name in kinds.values()]

    def write(self, path: Path) -> None:
        """Write the file, one expert at a time."""
        with writing(path, self.entries, self.metadata()) as file:
            for expert in range(self.stored.experts):
                w13, w2 = read_experts(self.stored, range(expert, expert + 1), self._target, self._device)
                matrices = (tuple(each[0] for each in matrix) for matrix in (w13, w2))
                try:
                    self.put(file, expert, *matrices)
                except ConfigError as error:  # which knows of this expert alone
                    raise ConfigError(f"{self.stored.what}, expert {expert}, by itself: {error}") from None

    @abstractmethod
    def put(self, file: Writer, expert: int, w13: WeightTensors, w2: WeightTensors) -> None:
        """Write an expert's tensors."""

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return {"format": "pt"}


class _Plain(Layer):
    """Experts by the names that models give them."""

    def __init__(
        self, stored: Stored, names: LayerNames, target: Target, device: torch.device, base: str, scheme: Scheme
    ) -> None:
        super().__init__(stored, names, target, device)
        self._base, self._scheme = base, scheme
        # who has exponents for scales reads no other ones
        self._exponents = stored.kind is Kind.MXFP4
        width, hidden = stored.intermediate, stored.hidden
        self.entries = {}
        for expert in range(stored.experts):
            for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                for name, (dtype, size) in zip(self._names(expert, part), target.parts(*shape), strict=True):
                    self.entries[name] = Entry(self._dtype(dtype), tuple(size))

    def _names(self, expert: int, part: str) -> tuple[str, str]:
        base = f"{self._base}experts.{expert}.{getattr(self._scheme, part)}."
        return f"{base}weight", f"{base}{self._scheme.scale}"

    def _dtype(self, dtype: torch.dtype) -> str:
        if dtype is torch.uint8:
            return "I8"
        return "F8_E8M0" if dtype is torch.float32 and self._exponents else DTYPES[dtype]

    def put(self, file: Writer, expert: int, w13: WeightTensors, w2: WeightTensors) -> None:
        halves = [tuple(each.chunk(2)) for each in w13]
        for part, tensors in (("gate", [h[0] for h in halves]), ("up", [h[1] for h in halves]), ("down", list(w2))):
            for name, tensor in zip(self._names(expert, part), tensors, strict=True):
                wanted = self.entries[name].dtype
                file.put(name, tensor.to(torch.float8_e8m0fnu) if wanted == "F8_E8M0" else tensor)


class _Ready(Layer):
    """Experts in the kernel's order, all of a layer in a tensor."""

    def __init__(
        self, stored: Stored, names: LayerNames, target: Target, device: torch.device, base: str, weights: WeightFormat
    ) -> None:
        super().__init__(stored, names, target, device)
        self._weights = weights
        width, hidden = stored.intermediate, stored.hidden
        self._names = {
            matrix: [f"{base}experts.{matrix}{'' if part == 'codes' else '_' + part}" for part in weights.part_names]
            for matrix in ("w13", "w2")
        }
        self.entries = {}
        for matrix, shape in (("w13", (2 * width, hidden)), ("w2", (hidden, width))):
            self.entries |= zip(self._names[matrix], entries_of(weights, stored.experts, *shape), strict=True)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt", METADATA_KEY: layout_of(self._weights)}

    def put(self, file: Writer, expert: int, w13: WeightTensors, w2: WeightTensors) -> None:
        rounding = "nearest" if self._target.lossy and self._weights is MXFP4 else None
        l1, l2 = transform_weights_for_mega_moe_sm90(w13, w2, inplace=True, rounding=rounding)
        for matrix, tensors in (("w13", l1), ("w2", l2)):
            for name, tensor in zip(self._names[matrix], tensors, strict=True):
                file.put(name, tensor, expert * tensor.numel() * tensor.itemsize)


def layers_of(files: Files, weight_format: str, device: torch.device, scheme: str | None, lossy: bool) -> list[Layer]:
    """Every layer of experts of a checkpoint, as it will be.

    Raises:
        ConfigError: one of them cannot be that.
        CheckpointError: a tensor of an expert is not there, or unlike those of the first.
    """
    made: list[Layer] = []
    for model in all_names_of(files, scheme):
        for number, names in model.layers.items():
            stored = layer_of(files, model, number)
            stored.check()
            target = target_of("auto" if weight_format == "megamoe" else weight_format, stored.kind, lossy)
            base = f"{model.prefix}layers.{number}.{_written_scheme(model).block}."
            if weight_format == "megamoe":
                weights = MXFP4 if stored.kind is Kind.MXFP4 else FP8
                made.append(_Ready(stored, names, target, device, base, weights))
            else:
                made.append(_Plain(stored, names, target, device, base, _written_scheme(model)))
    return made


def _written_scheme(model: ModelNames) -> Scheme:
    """By which experts are named; those that were one tensor get the names that most models have."""
    return SCHEMES["deepseek-v3" if model.scheme == FUSED else model.scheme]


def config_of(files: Files, layers: list[Layer], weight_format: str) -> dict[str, Any]:
    """The configuration of the result: the source's, and how its experts are quantised, where the source says it."""
    config, name = dict(files.config), text_of(files.config)
    text = config if name is None else dict(config[name])
    there = config if text.get("quantization_config") is None or config.get("quantization_config") else text
    for part in (config, text):
        part.pop("expert_dtype", None)
    found = there.get("quantization_config")
    there |= _quantised(files, layers, weight_format, dict(found) if isinstance(found, dict) else {})
    return config if name is None else {**config, name: text}


def _quantised(files: Files, layers: list[Layer], weight_format: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of quantisation, once experts are in a format; what it said of it before is given."""
    quantization.pop("expert_dtype", None)
    if weight_format == "megamoe":
        return {"quantization_config": {"quant_method": "megamoe", "of": quantization}}
    if quantization and quantization.get("quant_method") != "fp8":
        return {}  # as it was: what is beside the experts is still that
    if not quantization:  # nothing but experts is quantised
        kept = sorted(name.removesuffix(".weight") for name in _matrices(files, layers))
        quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": kept}
    quantization |= {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if weight_format != "mxfp4":
        return {"quantization_config": quantization}
    return {"expert_dtype": "fp4", "quantization_config": {**quantization, "expert_dtype": "fp4", "scale_fmt": "ue8m0"}}


def _matrices(files: Files, layers: list[Layer]) -> list[str]:
    """Weights of linear layers beside the experts."""
    taken = {name for layer in layers for name in layer.taken}
    names = [name for name in files if name.endswith(".weight") and name not in taken]
    return [name for name in names if len(files.entry(name).shape) == 2]
