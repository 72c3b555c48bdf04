"""What `convert` and `inspect-checkpoint` print."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe_jit._documents import Count, Digest, Document


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """A file of a converted model.

    Attributes:
        name: in the folder
        sha256: of the file
    """

    name: str
    bytes: Count
    sha256: Digest


@dataclass(frozen=True, slots=True)
class Converted(Document):
    """A model whose experts were written in another format.

    Attributes:
        source: the folder that was read
        target: the folder that was written
        format: of the experts
        files: with tensors, in the order in which they were written
    """

    KIND = "convert"

    source: str
    target: str
    format: str
    files: tuple[ConvertedFile, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Exponents of some experts of a layer.

    Attributes:
        experts: how many were looked at
        least: the least exponent of two among the scales
        most: the greatest one
        binades: that the values of the widest block of 128 x 128 span; of MXFP4 alone
        blocks: of 128 x 128 that were looked at; of MXFP4 alone
        exact: how many of them are exact as MXFP4 in the kernel; of MXFP4 alone
        exact_fp8: how many of them are exact as e4m3; of MXFP4 alone
    """

    experts: Count
    least: int
    most: int
    binades: Count | None = None
    blocks: Count | None = None
    exact: Count | None = None
    exact_fp8: Count | None = None


@dataclass(frozen=True, slots=True)
class CheckpointLayer:
    """A layer with experts.

    Attributes:
        layer: its number
        usable: whether it can be loaded
        problem: why not, or with what loss
        kind: how its experts are stored
        shared: how its shared expert is stored
        shared_experts: how many of the routed ones' width that is
        bytes_per_rank: of the weights of one rank, once they are loaded
        spread: of exponents, where it was looked at
    """

    layer: Count
    usable: bool
    problem: str | None = None
    kind: str | None = None
    experts: Count | None = None
    hidden: Count | None = None
    intermediate: Count | None = None
    shared: str | None = None
    shared_experts: Count | None = None
    bytes_per_rank: Count | None = None
    spread: Spread | None = None


@dataclass(frozen=True, slots=True)
class InspectedCheckpoint(Document):
    """What a model's checkpoint has for this layer.

    Attributes:
        path: that was looked at
        usable: whether all layers with experts can be loaded
        problem: why none can
        model_type: as config.json says
        scheme: by which tensors are named
        topk: experts of a token, as config.json says
        clamp: bound of SwiGLU, as config.json says
        ranks: that share the experts
        bytes_per_rank: of all layers
        layers: that have experts
    """

    KIND = "inspect-checkpoint"

    path: str
    usable: bool
    tensors: Count
    files: Count
    ranks: Count
    layers: tuple[CheckpointLayer, ...]
    bytes_per_rank: Count
    problem: str | None = None
    model_type: str | None = None
    scheme: str | None = None
    topk: int | None = None
    clamp: float | None = None
