"""Weight formats: how the weights of a layer are stored, as values.

Bytes of weights are computed here and nowhere else.  A value here, the module that it names and a policy in
`kernels_src/formats/` are a format (docs/how-to/add-a-weight-format.md).  Torch is imported
only when it is asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.abi import BLOCK_N
from megamoe_jit._text import shown

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """One of the tensors that a matrix is stored as."""

    name: str  #: for people, and in the names of a layer's buffers
    type: str  #: torch's name of its dtype
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return _dtype(self.type)


@dataclass(frozen=True, slots=True, eq=False)
class WeightFormat:
    """A format; each is one object, also in copies and other processes, and equal to itself alone.

    Attributes:
        name: for people, documents and the names of kernels.
        what: its codes, for people and for the variants that read them (`Variant.codes`).
        bits: of a weight.
        code_type: torch's name of the type of the tensor of codes; its last dimension is `code_shape`'s.
        scale_type, scale_size: torch's name of the type of scales; its bytes.
        scale_block: rows and columns of a matrix that share a scale.
        module: has `pack`, `unpack` and `dequantize` of this format, with the arguments of the methods here.
        group: columns of a row that share an exponent, a byte in a tensor between codes and scales; 0 for no such
            tensor. Callers bring codes and exponents then, and the transform works out the scales.
    """

    name: str
    what: str
    bits: int
    code_type: str
    scale_type: str
    scale_size: int
    scale_block: tuple[int, int]
    module: str
    group: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes copies, and those of other processes, the same object."""
        if FORMATS.get(self.name) is self:
            return WeightFormat.parse, (self.name,)
        return WeightFormat, astuple(self)

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """The format named `text`; raises `ConfigError` with the names there are."""
        if not isinstance(text, str) or text not in FORMATS:
            raise ConfigError(f"unknown weight format {shown(text)}; allowed: {', '.join(FORMATS)}")
        return FORMATS[text]

    @property
    def policy(self) -> str:
        """The policy struct in the kernel sources."""
        return self.name.title().replace("_", "")

    @property
    def header(self) -> str:
        """The room that defines it."""
        return f"formats/{self.name}.cuh"

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the tensor of codes."""
        return _dtype(self.code_type)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the tensor of scales."""
        return _dtype(self.scale_type)

    def code_shape(self, rows: int, depth: int) -> tuple[int, int]:
        """Of the codes of a ``[rows, depth]`` matrix; a code type has 8 bits, and may hold several weights."""
        return rows, depth * self.bits // 8

    def depth_of(self, width: int) -> int:
        """Columns of a matrix whose codes have so many."""
        return width * 8 // self.bits

    def scale_shape(self, rows: int, depth: int) -> tuple[int, int]:
        """Of its scales."""
        return rows // self.scale_block[0], depth // self.scale_block[1]

    def exponent_shape(self, rows: int, depth: int) -> tuple[int, int]:
        """Of its exponents; nothing where there are none."""
        return rows, depth // self.group if self.group else 0

    def parts(self, rows: int, depth: int) -> tuple[Part, ...]:
        """The tensors of a ``[rows, depth]`` matrix as the kernel reads them, in their order among callers."""
        codes = Part("codes", self.code_type, self.code_shape(rows, depth))
        scales = Part("scales", self.scale_type, self.scale_shape(rows, depth))
        if not self.group:
            return codes, scales
        return codes, Part("exponents", "uint8", self.exponent_shape(rows, depth)), scales

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of `parts`."""
        return ("codes", "exponents", "scales") if self.group else ("codes", "scales")

    def code_bytes(self, rows: int, depth: int) -> int:
        """Bytes of its codes."""
        return rows * depth * self.bits // 8

    def scale_bytes(self, rows: int, depth: int) -> int:
        """Bytes of its scales."""
        height, width = self.scale_shape(rows, depth)
        return height * width * self.scale_size

    def exponent_bytes(self, rows: int, depth: int) -> int:
        """Bytes of its exponents, one each."""
        return rows * depth // self.group if self.group else 0

    def stream_bytes(self, rows: int, depth: int) -> int:
        """Bytes that come into the stages by bulk copies: its codes and exponents."""
        return self.code_bytes(rows, depth) + self.exponent_bytes(rows, depth)

    def expert_code_bytes(self, hidden: int, intermediate: int) -> int:
        """Bytes of the codes, and exponents, of both matrices of an expert."""
        return self.stream_bytes(2 * intermediate, hidden) + self.stream_bytes(hidden, intermediate)

    def expert_bytes(self, hidden: int, intermediate: int) -> int:
        """The same with their scales."""
        scales = self.scale_bytes(2 * intermediate, hidden) + self.scale_bytes(hidden, intermediate)
        return self.expert_code_bytes(hidden, intermediate) + scales

    def pack(self, codes: torch.Tensor, gated: bool) -> torch.Tensor:
        """The codes of one expert's matrix, in the order in which the kernel reads them.

        Args:
            codes: uint8 ``[rows, bytes of a row]``.
            gated: it is the first one, gate rows then up rows.

        Returns:
            A new tensor of the same shape.
        """
        packed: torch.Tensor = self._ways().pack(codes, gated)
        return packed

    def unpack(self, codes: torch.Tensor, gated: bool) -> torch.Tensor:
        """Inverse of `pack`."""
        unpacked: torch.Tensor = self._ways().unpack(codes, gated)
        return unpacked

    def pack_exponents(self, exponents: torch.Tensor, gated: bool) -> torch.Tensor:
        """As `pack`, of exponents uint8 ``[rows, groups of a row]``, for a format that has groups."""
        packed: torch.Tensor = self._ways().pack_exponents(exponents, gated)
        return packed

    def unpack_exponents(self, exponents: torch.Tensor, gated: bool) -> torch.Tensor:
        """Inverse of `pack_exponents`."""
        unpacked: torch.Tensor = self._ways().unpack_exponents(exponents, gated)
        return unpacked

    def dequantize(self, codes: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The values of codes that are not packed, float32 ``[..., rows, depth]``.

        Args:
            codes: as callers bring them.
            factors: scales; exponents for a format that has groups, as callers bring them.
        """
        values: torch.Tensor = self._ways().dequantize(codes, factors)
        return values

    def _ways(self) -> Any:
        return importlib.import_module(self.module)


def _dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


FP8 = WeightFormat("fp8", "e4m3", 8, "float8_e4m3fn", "float32", 4, (128, 128), "megamoe_jit._layer.fp8")
FP8_E5M2 = WeightFormat("fp8e5m2", "e5m2", 8, "float8_e5m2", "float32", 4, (128, 128), "megamoe_jit._layer.fp8")
MXFP4 = WeightFormat("mxfp4", "e2m1", 4, "uint8", "float32", 4, (128, 128), "megamoe_jit._layer.mxfp4", 32)
FORMATS = {each.name: each for each in (FP8, FP8_E5M2, MXFP4)}  #: by name


class ExpandedParts(NamedTuple):
    """Bytes of the memory in which a variant that expands packed weights has them: parts, one behind the other."""

    first: int  #: e5m2 codes of the first matrices
    second: int  #: and of the second ones
    counters: int  #: of what is expanded: u32, one for each column of tiles

    @classmethod
    def of(cls, hidden: int, intermediate: int, experts: int) -> ExpandedParts:
        """Of so many experts on one rank."""
        columns = 2 * intermediate // BLOCK_N + -(-hidden // BLOCK_N)
        first = FP8_E5M2.code_bytes(2 * intermediate, hidden)
        return cls(experts * first, experts * FP8_E5M2.code_bytes(hidden, intermediate), experts * columns * 4)
