"""Ways to multiply each expert's rows by its matrix, of public parts alone: what an unfused layer is made of."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.quantize import (
    AMAX_FLOOR,
    E4M3_MAX,
    dequantize_activations,
    dequantize_weights,
    quantize_activations,
)
from megamoe_jit._spec import BLOCK
from megamoe_jit._text import first_line

_any: Any = torch  # private operators of torch have no types


def _rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one scale for each row of the last dimension."""
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=AMAX_FLOOR) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


class Gemm:
    """A way to multiply each expert's rows by its matrix; made once per weight tensor."""

    name = ""
    bound = 0.0  #: `calc_diff` to the FP32 reference that its numerics allow
    row_step = 16  #: an expert's rows are padded to a multiple of this

    def __init__(self, weights: WeightTensors, ends: Sequence[int]) -> None:
        """Take weights ``[E, N, K]`` with 128 x 128 scales; expert e has rows ``ends[e - 1]`` to ``ends[e]``."""
        self.begins, self.ends = [0, *ends[:-1]], list(ends)

    @staticmethod
    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[n, K]`` and scales ``[n, S]`` of rows, as this multiplication wants them."""
        return quantize_activations(x)

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Rows bfloat16 ``[P, N]``."""
        raise NotImplementedError


class DeepGemmGrouped(Gemm):
    """DeepGEMM's grouped product over contiguous rows, with the layer's own scales; only if it is installed."""

    name = "DeepGEMM grouped, block scales"
    bound = 1e-3
    row_step = 128

    def __init__(self, weights: WeightTensors, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        self.weights = weights
        rows = [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]
        experts = torch.arange(len(rows), dtype=torch.int32, device="cpu")
        owners = experts.repeat_interleave(torch.tensor(rows, dtype=torch.int64, device="cpu"))
        self.owners = owners.to(weights[0].device)
        library: Any = importlib.import_module("deep_gemm")
        self.multiply = library.m_grouped_fp8_gemm_nt_contiguous

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out = torch.empty(codes.shape[0], self.weights[0].shape[1], dtype=torch.bfloat16, device=codes.device)
        self.multiply((codes, scales), self.weights, out, self.owners)
        return out


class GroupedRowwise(Gemm):
    """One `torch._scaled_grouped_mm` for all experts; a scale per row of activations and of weights."""

    name = "scaled_grouped_mm, row-wise scales"
    bound = 1e-2  #: weights and inputs are quantised a second time, with coarser scales
    quantise = staticmethod(_rowwise)

    def __init__(self, weights: WeightTensors, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        codes, scales = weights
        self.codes = torch.empty_like(codes)
        self.scales = torch.empty(codes.shape[:2], dtype=torch.float32, device=codes.device)
        for e in range(codes.shape[0]):
            self.codes[e], scale = _rowwise(dequantize_weights(codes[e], scales[e]))
            self.scales[e] = scale[:, 0]
        self.offsets = torch.tensor(self.ends, dtype=torch.int32, device=codes.device)

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _any._scaled_grouped_mm(
            codes,
            self.codes.transpose(-2, -1),
            scales.view(-1),
            self.scales,
            offs=self.offsets,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return result


class BlockwiseEach(Gemm):
    """One `torch._scaled_mm` for each expert, with the layer's own 1 x 128 and 128 x 128 scales."""

    name = "scaled_mm per expert, block scales"
    bound = 1e-3

    def __init__(self, weights: WeightTensors, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        self.codes, scales = weights
        blocks = scales.shape[2]
        rows_of_16_bytes = (*scales.shape[:2], -(-blocks // 4) * 4)  # as cuBLAS wants them
        padded = torch.zeros(rows_of_16_bytes, dtype=torch.float32, device=scales.device)
        padded[..., :blocks] = scales
        self.scales = padded[..., :blocks]
        self.blocks = blocks
        places = []  # the scales of an expert's rows must lie together, block by block
        block = torch.arange(blocks, dtype=torch.int64, device=scales.device)[:, None]
        for begin, end in zip(self.begins, self.ends, strict=True):
            row = torch.arange(begin, end, dtype=torch.int64, device=scales.device)
            places.append((row[None, :] * blocks + block).view(-1))
        self.places = torch.cat(places)

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out = torch.empty(codes.shape[0], self.codes.shape[1], dtype=torch.bfloat16, device=codes.device)
        moved = scales.reshape(-1)[self.places]
        for e, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            if begin == end:
                continue
            mine = moved[begin * self.blocks : end * self.blocks].view(self.blocks, end - begin)
            _any._scaled_mm(
                codes[begin:end],
                self.codes[e].t(),
                scale_a=mine.t(),
                scale_b=self.scales[e].t(),
                out_dtype=torch.bfloat16,
                out=out[begin:end],
            )
        return out


class Dequantised(Gemm):
    """One bf16 product for each expert, its weights dequantised beforehand; the last resort."""

    name = "bf16 matmul per expert, weights dequantised"
    bound = 1e-3

    def __init__(self, weights: WeightTensors, ends: Sequence[int]) -> None:
        super().__init__(weights, ends)
        codes, scales = weights
        self.matrices = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
        for e in range(codes.shape[0]):
            self.matrices[e] = dequantize_weights(codes[e], scales[e])

    def __call__(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows = dequantize_activations(codes, scales).to(torch.bfloat16)
        out = torch.empty(codes.shape[0], self.matrices.shape[1], dtype=torch.bfloat16, device=codes.device)
        for e, (begin, end) in enumerate(zip(self.begins, self.ends, strict=True)):
            if begin < end:
                torch.mm(rows[begin:end], self.matrices[e].t(), out=out[begin:end])
        return out


GEMMS: tuple[type[Gemm], ...] = (DeepGemmGrouped, GroupedRowwise, BlockwiseEach, Dequantised)


def refusal(error: Exception) -> str:
    """Why something cannot be used, in a line."""
    if isinstance(error, ImportError):
        return f"{error.name or 'a package it needs'} is not installed"
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def probe(method: type[Gemm], device: torch.device) -> str:
    """Why a method does not work with this torch and GPU; empty if it does, and gives what it should."""
    gen = torch.Generator(device=device).manual_seed(0)
    n, k, step = 256, 512, method.row_step
    ends = (2 * step, 2 * step, 5 * step)
    codes = torch.randn(3, n, k, generator=gen, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(3, n // BLOCK, k // BLOCK, generator=gen, dtype=torch.float32, device=device) + 0.5
    x = torch.randn(ends[-1], k, generator=gen, dtype=torch.float32, device=device)
    try:
        got = method((codes, scales), ends)(*method.quantise(x)).float()
    except (ImportError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
        return refusal(error)
    exact = torch.empty_like(got)
    for e, (begin, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        exact[begin:end] = x[begin:end] @ dequantize_weights(codes[e], scales[e]).T
    error_ratio = float((got - exact).norm() / exact.norm())
    return "" if error_ratio < 0.1 else f"wrong results (relative error {error_ratio:.2g})"
