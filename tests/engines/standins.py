"""The reference in the kernel's place, for engines that run on a CPU: buffers without a GPU, calls that compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megamoe_jit._device.layout import CAPACITY_STEP
from megamoe_jit._layer import calls, from_bf16, serving, workspace
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.quantize import dequantize_activations, quantize_activations, quantize_weights
from megamoe_jit._layer.weights import inverse_transform_weights_for_mega_moe_sm90, is_transformed
from megamoe_jit._spec import MoEShape
from megamoe_jit.reference import moe_reference

__all__ = ["Batch", "Buffer", "batch", "expected", "experts", "kernels_by_reference", "packed_experts"]


@dataclass
class Buffer:
    """A buffer as far as plug-ins see it."""

    group: Any
    shape: MoEShape
    num_max_tokens_per_rank: int
    prepared: int = 0
    calls: list[int] = field(default_factory=list)  #: tokens of each
    formats: list[str] = field(default_factory=list)  #: that were prepared
    staged: Any = None  #: x, ids and weights
    destroyed: bool = False
    device = torch.device("cpu")
    rank = 1
    fault: torch.Tensor = field(default_factory=lambda: torch.zeros(16, dtype=torch.int32))

    @property
    def ranks(self) -> int:
        return 1 if self.group in (None, "lease") else 2

    @property
    def hidden(self) -> int:
        return self.shape.hidden

    def prepare_all(self, *_: Any, weight_format: str = "fp8") -> None:
        self.prepared += 1
        self.formats.append(weight_format)

    def destroy(self) -> None:
        self.destroyed = True


@dataclass
class _Lease:
    buffer: Buffer

    @property
    def capacity(self) -> int:
        return self.buffer.num_max_tokens_per_rank

    @property
    def shape(self) -> MoEShape:
        return self.buffer.shape


def _make_buffer(
    group: Any, experts: int, tokens: int, topk: int, hidden: int, intermediate: int, shared: int = 0, **_: Any
) -> Buffer:
    capacity = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
    return Buffer(group, MoEShape(hidden, intermediate, experts, topk, shared), capacity)


def _run(x, ids, weights, l1, l2, buffer, *, y=None, routed_scaling_factor=1.0, activation_clamp=None, **_):
    assert is_transformed(l1, l2)
    assert ids.shape == weights.shape == (x.shape[0], buffer.shape.topk)
    assert x.shape[0] <= buffer.num_max_tokens_per_rank
    buffer.calls.append(x.shape[0])
    plain1, plain2 = inverse_transform_weights_for_mega_moe_sm90(l1, l2)
    found = expected(Batch(x, ids, weights), plain1, plain2, activation_clamp, routed_scaling_factor)
    return found if y is None else y.copy_(found)


def kernels_by_reference(patch: Any) -> list[Buffer]:
    """Let the reference compute what plug-ins launch; the buffers that they make from then on."""
    made: list[Buffer] = []

    def buffer(*args: Any, **options: Any) -> Buffer:
        made.append(_make_buffer(*args, **options))
        return made[-1]

    def lease(shape: MoEShape, tokens: int, device: Any, wanted: object = "shared") -> _Lease:
        sizes = shape.experts, tokens, shape.topk, shape.hidden, shape.intermediate
        same = [each for each in made if each.shape == shape and each.group == "lease"]
        return _Lease(same[0] if same else buffer("lease", *sizes))

    def serve(
        buffer: Buffer, x: Any, ids: Any, weights: Any, l1: Any, l2: Any, clamp: Any, _: bool, y: Any = None
    ) -> Any:
        step = buffer.num_max_tokens_per_rank
        parts = [slice(at, at + step) for at in range(0, x.shape[0], step)]
        found = torch.cat([_run(x[p], ids[p], weights[p], l1, l2, buffer, activation_clamp=clamp) for p in parts])
        return found if y is None else y.copy_(found)

    def stage(buffer: Buffer, x: Any, ids: Any, weights: Any, *, x_scales: Any = None) -> int:
        buffer.staged = (x if x_scales is None else dequantize_activations(x, x_scales), ids, weights)
        return int(x.shape[0])

    def launch(y: Any, l1: Any, l2: Any, buffer: Buffer, *, activation_clamp: float | None = None) -> None:
        assert y.shape == buffer.staged[0].shape
        _run(*buffer.staged, l1, l2, buffer, y=y, activation_clamp=activation_clamp)

    patch.setattr(calls, "get_symm_buffer_for_mega_moe", buffer)
    patch.setattr(calls, "fp8_mega_moe", launch)
    patch.setattr("megamoe_jit._layer.stage.stage", stage)
    patch.setattr(from_bf16, "mega_moe_from_bf16", _run)
    patch.setattr(serving, "serve", serve)
    patch.setattr(workspace, "lease", lease)
    patch.setattr("megamoe_jit.engines.local.lease", lease)
    return made


@dataclass
class Batch:
    """What a router gives a layer."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def batch(tokens: int, shape: MoEShape, seed: int = 0, device: str = "cpu") -> Batch:
    """A batch with some slots masked."""
    torch.manual_seed(seed)
    scores = torch.rand(tokens, shape.experts)
    weights, ids = scores.topk(shape.topk)
    ids = torch.where(torch.rand(ids.shape) < 0.1, -1, ids).to(torch.int32)
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    return Batch(x.to(device), ids.to(device), weights.float().to(device))


def experts(shape: MoEShape, seed: int = 0, device: str = "cpu") -> tuple[WeightTensors, WeightTensors]:
    """Plain FP8 weights of both matrices."""
    torch.manual_seed(seed)
    w13 = 0.05 * torch.randn(shape.experts, 2 * shape.intermediate, shape.hidden)
    w2 = 0.05 * torch.randn(shape.experts, shape.hidden, shape.intermediate)
    pairs = quantize_weights(w13), quantize_weights(w2)
    return tuple(tuple(each.to(device) for each in pair) for pair in pairs)  # type: ignore[return-value]


def packed_experts(shape: MoEShape, seed: int = 0, device: str = "cpu") -> tuple[WeightTensors, WeightTensors]:
    """Plain MXFP4 weights of both matrices: bytes of two codes, and e8m0 exponents."""
    torch.manual_seed(seed)

    def matrix(rows: int, depth: int) -> WeightTensors:
        codes = torch.randint(0, 256, (shape.experts, rows, depth // 2), dtype=torch.uint8)
        exponents = torch.randint(118, 123, (shape.experts, rows, depth // 32), dtype=torch.uint8)
        return codes.to(device), exponents.view(torch.float8_e8m0fnu).to(device)

    return matrix(2 * shape.intermediate, shape.hidden), matrix(shape.hidden, shape.intermediate)


def expected(
    of: Batch, l1: WeightTensors, l2: WeightTensors, clamp: float | None = None, factor: float = 1.0
) -> torch.Tensor:
    """The reference's answer."""
    codes, scales = quantize_activations(of.x)
    weights = of.weights.float() * factor
    return moe_reference(codes, scales, of.ids.long(), weights, l1, l2, activation_clamp=clamp)
