"""`PreparedKernel`: one loaded kernel with the parameter block through which a buffer calls it."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megamoe_jit._device.l2_partition import sides_of_sms
from megamoe_jit._device.launch import Launcher
from megamoe_jit._device.load import load_kernel
from megamoe_jit._device.params import Params, aligned_params
from megamoe_jit._device.tensor_map import encode_fp8_rows
from megamoe_jit._layer.checks import check_weights
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec.abi import ACT_BOX_ROWS, COUNTER_ROWS, SMALL_BOX_ROWS

if TYPE_CHECKING:
    from megamoe_jit._layer.buffer import SymmBuffer
    from megamoe_jit._layer.weights import WeightPair
    from megamoe_jit._spec import KernelSpec
    from megamoe_jit.heuristics.select import Choice

__all__ = ["CallPlan", "PreparedKernel"]


@dataclass(frozen=True, slots=True)
class CallPlan:
    """What a call with these tokens and options launches."""

    kernel: PreparedKernel
    choice: Choice
    num_sms: int
    sort_blocks: int
    two_sides: bool  #: each half of the L2 has columns of its own


class PreparedKernel:
    """A kernel bound to a buffer: a call writes a few fields of `params` and launches."""

    def __init__(self, spec: KernelSpec, buffer: SymmBuffer) -> None:
        self.spec, self._device = spec, buffer.device
        self.params: Params = aligned_params()
        self.loaded = load_kernel(spec, buffer.device.index, param_bytes=ctypes.sizeof(Params))
        self.launcher = Launcher(self.loaded, self.params)
        self._weights: tuple[int, ...] = ()
        self._checked: tuple[weakref.ref[torch.Tensor], ...] = ()
        self._checked_at: tuple[int, ...] = ()
        self._fill(buffer)

    def _fill(self, buffer: SymmBuffer) -> None:
        params, layout, shape = self.params, buffer.layout, self.spec.shape
        base = buffer.local.data_ptr()
        for section in layout.symmetric:
            setattr(params, section.name, section.offset)
        for section in layout.local:
            setattr(params, section.name, base + section.offset)
        for rank, address in enumerate(buffer.handle.buffer_ptrs):
            params.peers[rank] = address
        rows = layout.pool_rows
        encode_fp8_rows(params.act1, params.act1_pool, rows, shape.hidden, ACT_BOX_ROWS)
        encode_fp8_rows(params.act2, params.act2_pool, rows, shape.intermediate, ACT_BOX_ROWS)
        encode_fp8_rows(params.act1_small, params.act1_pool, rows, shape.hidden, SMALL_BOX_ROWS)
        encode_fp8_rows(params.act2_small, params.act2_pool, rows, shape.intermediate, SMALL_BOX_ROWS)
        params.pool_rows = rows
        params.counters = layout.rows // COUNTER_ROWS
        params.rank = buffer.rank
        params.fault = buffer.fault.data_ptr()
        sides = sides_of_sms(buffer.device) if get_settings().l2_sides else None
        self.knows_sides = sides is not None
        if sides is not None:
            params.side_of_sm[:] = sides
        params.timeout_ns = int(get_settings().timeout_s * 1e9)

    def check_weights(self, l1: WeightPair, l2: WeightPair, device: torch.device) -> None:
        """Raise `ConfigError` unless these are the kernel's weights; tensors that were checked last are not again."""
        tensors = (*l1, *l2)
        if len(tensors) == len(self._checked) and all(
            ref() is tensor for ref, tensor in zip(self._checked, tensors, strict=True)
        ):
            return
        self._checked_at = ()
        check_weights(l1, l2, self.spec, device)
        self._checked = tuple(weakref.ref(tensor) for tensor in tensors)
        self._checked_at = tuple(tensor.data_ptr() for tensor in tensors)

    def set_weights(self, l1: WeightPair, l2: WeightPair) -> None:
        """Point the kernel at these tensors; cheap when they are where they were.

        Raises:
            ConfigError: they are not the kernel's weights; the data of a checked tensor may have been replaced.
        """
        addresses = (l1[0].data_ptr(), l1[1].data_ptr(), l2[0].data_ptr(), l2[1].data_ptr())
        if addresses == self._weights:
            return
        if addresses != self._checked_at:
            check_weights(l1, l2, self.spec, self._device)
        self._weights = ()  # until all of them are set: an exception between two must not leave a mixture
        params = self.params
        params.weight1, params.weight1_scales, params.weight2, params.weight2_scales = addresses
        self._weights = addresses
