"""Writes checkpoints of models as their makers do, byte by byte: what `megamoe_jit.checkpoints` is held against.

Nothing here is the package's, nor the library's that reads the files. Numbers of formats are turned into values by
tables that are written out from their definitions.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

E4M3 = np.array(
    [
        (-1.0 if code & 128 else 1.0)
        * ((code & 7) / 8 * 2.0**-6 if code & 120 == 0 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3 & 15) - 7))
        if code & 127 != 127
        else np.nan
        for code in range(256)
    ],
    dtype=np.float32,
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


@dataclass(frozen=True)
class Tensor:
    """Bytes with a dtype and a shape, as a file has them."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file: length of the header, the header, the bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
        at += len(tensor.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values()))


def bf16(values: np.ndarray) -> bytes:
    """Values that bf16 has, as it writes them."""
    words = values.astype(np.float32).view(np.uint32)
    assert not (words & 0xFFFF).any()
    return (words >> 16).astype("<u2").tobytes()


def floats(values: np.ndarray, dtype: str) -> Tensor:
    """Values as a tensor of a floating dtype; exponents of F8_E8M0 and U8 of powers of two."""
    if dtype == "BF16":
        data = bf16(values)
    elif dtype in ("F8_E8M0", "U8"):
        data = (np.log2(values).round().astype(np.int32) + 127).astype(np.uint8).tobytes()
    else:
        data = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    return Tensor(dtype, values.shape, data)


@dataclass
class Model:
    """A model to be written.

    Attributes:
        block, gate, up, down, scale: names, as its makers have them.
        kind: fp8, fp8-tensor, fp8-channel, mxfp4 or bf16.
        scales: dtype of the scales.
        prefix: in front of every name.
        shared: names of the shared expert; none without.
        shared_width: of it, in those of routed experts.
        fused: all experts in one tensor, by these names.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    scale: str = "weight_scale_inv"
    kind: str = "fp8"
    scales: str = "F32"
    prefix: str = "model."
    shared: str = ""
    shared_width: int = 1
    fused: bool = False
    experts: int = 4
    hidden: int = 256
    intermediate: int = 128
    layers: tuple[int, ...] = (1, 2)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    values: dict[str, np.ndarray] = field(default_factory=dict)  #: what each weight is, by name
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def make(self) -> Model:
        """Draw every tensor."""
        rng = np.random.default_rng(self.seed)
        for layer in self.layers:
            base = f"{self.prefix}layers.{layer}.{self.block}."
            self.tensors[f"{base}gate.weight"] = floats(np.ones((self.experts, self.hidden)), "BF16")
            parts = ((self.gate, True), (self.up, True), (self.down, False))
            if self.fused:
                for name, shape in (
                    ("gate_up_proj", (self.experts, 2 * self.intermediate, self.hidden)),
                    ("down_proj", (self.experts, self.hidden, self.intermediate)),
                ):
                    drawn = [self._draw(rng, self.kind, self.scales, *shape[1:]) for _ in range(self.experts)]
                    self._put(f"{base}experts.{name}", "_scale_inv", [each[0] for each in drawn], drawn)
            for expert in range(0 if self.fused else self.experts):
                for part, wide in parts:
                    shape = (self.intermediate, self.hidden) if wide else (self.hidden, self.intermediate)
                    self._put_one(rng, f"{base}experts.{expert}.{part}", self.kind, self.scales, shape)
            width = self.shared_width * self.intermediate
            for part, wide in parts if self.shared else ():
                shape = (width, self.hidden) if wide else (self.hidden, width)
                # DeepSeek-V4 has MXFP4 beside FP8 with exponents
                kind = "fp8" if self.kind == "mxfp4" else self.kind
                self._put_one(rng, f"{base}{self.shared}.{part}", kind, self.scales, shape)
        return self

    def _put_one(self, rng: Any, name: str, kind: str, scales: str, shape: tuple[int, int]) -> None:
        values, weight, factors = self._draw(rng, kind, scales, *shape)
        self.values[name] = values
        self.tensors[f"{name}.weight"] = weight
        if factors is not None:
            self.tensors[f"{name}.{self.scale}"] = factors

    def _put(self, name: str, ending: str, values: list[np.ndarray], drawn: list[Any]) -> None:
        self.values[name] = np.stack(values)
        for place, suffix in ((1, ""), (2, ending)):
            parts = [each[place] for each in drawn]
            if parts[0] is not None:
                shape = (len(parts), *parts[0].shape)
                self.tensors[name + suffix] = Tensor(parts[0].dtype, shape, b"".join(part.data for part in parts))

    def _draw(self, rng: Any, kind: str, scales: str, rows: int, columns: int) -> tuple[np.ndarray, Tensor, Any]:
        """Values, the tensor of codes, and that of scales."""
        if kind in ("bf16", "f16", "f32"):
            values = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
            values = (
                (values.view(np.uint32) & 0xFFFF0000)
                .view(np.float32)
                .astype(np.float16 if kind == "f16" else np.float32)
            )
            values = values.astype(np.float32)
            return values, floats(values, kind.upper()), None
        exponents = scales in ("F8_E8M0", "U8")
        if kind == "mxfp4":
            codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
            factors = np.exp2(rng.integers(-9, -3, (rows, columns // 32))).astype(np.float32)
            packed = codes[:, ::2] | codes[:, 1::2] << 4
            weight = Tensor("I8", packed.shape, packed.tobytes())
            return E2M1[codes] * np.repeat(factors, 32, 1), weight, floats(factors, "F8_E8M0")
        codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        codes[codes & 127 == 127] = 0  # no NaN
        shape = {"fp8": (rows // 128, columns // 128), "fp8-tensor": (1,), "fp8-channel": (rows, 1)}[kind]
        factors = np.exp2(rng.integers(-14, -9, shape)).astype(np.float32)
        if not exponents:
            factors *= (1 + rng.integers(0, 128, shape) / 128).astype(np.float32)  # that bf16 has
        spread = np.broadcast_to(factors, (1, 1)) if kind == "fp8-tensor" else factors
        each = np.repeat(np.repeat(spread, rows // spread.shape[0], 0), columns // spread.shape[1], 1)
        return E4M3[codes] * each, Tensor("F8_E4M3", codes.shape, codes.tobytes()), floats(factors, scales)

    def write(self, folder: Path, shards: int = 3) -> Path:
        """The folder as one fetches it: shards, their index and the configuration."""
        if not self.tensors:
            self.make()
        folder.mkdir(parents=True, exist_ok=True)
        names = list(self.tensors)
        size = -(-len(names) // shards)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = names[shard * size : (shard + 1) * size]
            write_file(folder / file, {name: self.tensors[name] for name in part}, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {"hidden_act": "silu", "num_experts_per_tok": 2, "num_experts": self.experts, **self.config}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Values of an expert: gate rows then up rows, and down."""
        base = f"{self.prefix}layers.{layer}.{self.block}.experts."
        if self.fused:
            return self.values[f"{base}gate_up_proj"][expert], self.values[f"{base}down_proj"][expert]
        gate, up, down = (self.values[f"{base}{expert}.{part}"] for part in (self.gate, self.up, self.down))
        return np.concatenate((gate, up)), down


V3 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}}
W123 = {"gate": "w1", "up": "w3", "down": "w2"}
#: The models that people have, as they are named and stored.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"shared": "shared_experts", "config": {**V3, "model_type": "deepseek_v3"}},
    "deepseek-v4": {
        **W123,
        "block": "ffn",
        "scale": "scale",
        "scales": "F8_E8M0",
        "kind": "mxfp4",
        "prefix": "",
        "shared": "shared_experts",
        "config": {
            "model_type": "deepseek_v4",
            "swiglu_limit": 10.0,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        },
    },
    "deepseek-v4-base": {
        **W123, "block": "ffn", "scale": "scale", "scales": "F8_E8M0", "prefix": "", "shared": "shared_experts",
        "config": {**V3, "model_type": "deepseek_v4", "swiglu_limit": 10.0},
    },
    "glm-5": {"shared": "shared_experts", "config": {**V3, "model_type": "glm_moe_dsa"}},
    "minimax-m2": {**W123, "block": "block_sparse_moe", "config": {**V3, "model_type": "minimax_m2"}},
    "mimo-v2.5": {"config": {**V3, "model_type": "mimo_v2_flash"}},
    "kimi-k2": {"shared": "shared_experts", "config": {**V3, "model_type": "kimi_k2"}},
    "qwen3-moe": {"scales": "BF16", "config": {**V3, "model_type": "qwen3_moe"}},
    "qwen3.5-moe": {
        "scales": "F16",
        "prefix": "model.language_model.",
        "shared": "shared_expert",
        "config": {"model_type": "qwen3_5_moe", **V3, "text_config": {"num_experts_per_tok": 2, "num_experts": 4}},
    },
    "qwen3.5-moe-bf16": {"kind": "bf16", "fused": True, "prefix": "model.language_model.", "shared": "shared_expert"},
    "mixtral": {**W123, "block": "block_sparse_moe", "kind": "bf16", "config": {"model_type": "mixtral"}},
    "qwen3-moe-bf16": {"kind": "bf16", "config": {"model_type": "qwen3_moe"}},
    "float32": {"kind": "f32"},
    "float16": {"kind": "f16"},
    "per-tensor": {"kind": "fp8-tensor"},
    "fused-fp8": {"fused": True, "config": V3},
}  # fmt: skip


def model(name: str, **changes: Any) -> Model:
    """One of `MODELS`, with other sizes."""
    return Model(**{**MODELS[name], **changes}).make()
