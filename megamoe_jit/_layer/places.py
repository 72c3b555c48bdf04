"""Whether weights can be brought into another order where they are: each element in a place of its own."""

from __future__ import annotations

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors, as_bytes, stacked
from megamoe_jit._layer.marks import spans
from megamoe_jit._spec.formats import WeightFormat


def require_dense(name: str, tensor: torch.Tensor, what: str) -> None:
    """Raise unless each expert's rows follow each other."""
    if not stacked(tensor)[:1].squeeze(0).is_contiguous():
        raise ConfigError(
            f"{name} {what} have strides {tensor.stride()}; allowed in place: each expert's rows one after the other, "
            "as the kernel reads them"
        )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte and past its last."""
    last = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + tensor.itemsize * last


def require_places(l1: WeightTensors, l2: WeightTensors, weights: WeightFormat, forth: bool) -> None:
    """Raise unless every element of both can be written without another one, or a scale, being changed."""
    taken: list[tuple[int, int, str, bool]] = []
    for name, given in (("l1", l1), ("l2", l2)):
        for what, tensor in zip(("weights", "exponents") if weights.group else ("weights",), given, strict=False):
            require_dense(name, tensor, what)
            start = tensor.data_ptr() - int(tensor.storage_offset())
            taken += [(start + begin, start + end, f"{name} {what}", True) for begin, end in spans(as_bytes(tensor))]
        if len(given) == len(weights.part_names):
            written = bool(weights.group) and forth
            if written:
                require_dense(name, given[-1], "scales")
            taken.append((*_extent(given[-1]), f"{name} scales", written))
    furthest = {True: (0, ""), False: (0, "")}  # of what is written, and what is not
    for begin, end, what, written in sorted(taken):
        for reach, whose in (furthest[True], furthest[False]) if written else (furthest[True],):
            if begin < reach and begin < end:
                shared = f"elements of {what} are elements of {whose} too"
                raise ConfigError(f"{shared}; allowed with inplace=True: each element in a place of its own")
        furthest[written] = max(furthest[written], (end, what))
