"""`ModuleState`: what torch does with the weights of a module: state dicts out and in, moves, other dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.plain_weights import FLOATS, Given, Matrix, check_same, parts, read_matrix, write_matrix
from megamoe_jit._spec import WeightFormat


class ModuleState(torch.nn.Module):
    """The weights of a layer as a state dict has them: in the plain order, in the CPU's memory.

    Attributes:
        l1, l2: tensors of both matrices in the kernel's order, which are buffers of the module and stay where they are.
        buffer: what orders reading and writing them with calls.
        num_shared_experts: how many of the experts, the last ones.
        weight_format: the name of the format that they are in.
    """

    l1: Any
    l2: Any
    buffer: Any
    l1_codes: torch.Tensor
    num_shared_experts: int
    weight_format: str
    _names: tuple[tuple[str, ...], ...]  #: of the buffers of both matrices
    _rounded: bool

    @property
    def _held(self) -> tuple[str, ...]:
        """The names of the buffers that hold the weights."""
        return self._names[0] + self._names[1]

    def _parts(self) -> list[tuple[Matrix, WeightTensors]]:
        return parts(self.l1, self.l2, self.num_shared_experts)

    def _write(self, matrix: Matrix, given: Given, held: WeightTensors) -> None:
        refuse_capture("weights cannot be loaded", "load them before the capture")
        with self.buffer.lock:
            self.buffer.wait_for_last()  # a kernel on another stream may still read them
            write_matrix(matrix, given, held, self._rounded)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if torch.compiler.is_exporting():  # an exported program keeps them as they are, as constants
            return
        refuse_capture("weights cannot be read", "read them before the capture")
        for matrix, held in self._parts():
            destination.update(zip(self._keys(prefix, matrix), read_matrix(matrix, held), strict=True))

    def _keys(self, prefix: str, matrix: Matrix) -> tuple[str, str]:
        """Under which a matrix in the plain order stands in a state dict: codes, and what they are multiplied with."""
        return prefix + matrix.name, f"{prefix}{matrix.name}_{WeightFormat.parse(self.weight_format).part_names[1]}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        others: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs)
        for matrix, held in self._parts():
            names = self._keys(prefix, matrix)
            values, factors = (state_dict.get(name) for name in names)
            if values is None:
                missing_keys += [name for name in names if strict and name not in state_dict]
            else:
                plain = factors is None and isinstance(values, torch.Tensor) and values.dtype in FLOATS
                given: Any = values if plain else (values, factors)
                try:
                    check_same(matrix.name, given, held, self._rounded)
                    self._write(matrix, given, held)
                except ConfigError as error:
                    error_msgs.append(f'While loading "{names[0]}": {error}')
            others = [name for name in others if name not in names]
        unexpected_keys += others

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to()`, `half()`, `cuda()`, `cpu()` and `to_empty()` do to each tensor: nothing to the weights.

        Raises:
            ConfigError: it would move them.
        """
        here = self.l1_codes.device
        there = fn(torch.empty(0, dtype=torch.bfloat16, device=here)).device
        if there != here:
            raise ConfigError(
                f"a MegaMoE cannot be moved from {here} to {there}: kernels, the buffer and captured graphs know its "
                f"weights by address; allowed: {here}, or a layer made there out of this one's state_dict()"
            )
        held = {name: self._buffers.pop(name) for name in self._held}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        finally:
            self._buffers.update(held)
