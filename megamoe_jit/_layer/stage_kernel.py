"""`StageKernel`: the kernel that stages a batch in a launch of its own; `StageParams`, which it alone writes."""

from __future__ import annotations

import ctypes
import functools
import threading

import torch

from megamoe_jit._device.launch import Launcher
from megamoe_jit._device.load import load_kernel
from megamoe_jit._device.params import StageParams, aligned
from megamoe_jit._device.sms import sm_count
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._spec import BLOCK
from megamoe_jit._spec.abi import STAGE_THREADS
from megamoe_jit._spec.any_layer import StageFormat, StageSpec

BLOCKS_PER_SM = 6  #: as many as fit
HALF_WARPS = STAGE_THREADS // 16  #: each has a group of 128 columns


class Outputs:
    """Where staging writes: views of a buffer, or tensors of the caller; addresses are read once.

    Args:
        x: e4m3 ``[capacity, hidden]``.
        x_sf: float32 ``[capacity, hidden / 128]``.
        topk_idx: int64 ``[capacity, topk]``.
        topk_weights: float32 ``[capacity, topk]``; all of them contiguous.
    """

    __slots__ = ("addresses", "device", "hidden", "topk")

    def __init__(self, x: torch.Tensor, x_sf: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self.addresses = (x.data_ptr(), x_sf.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr())
        self.device, self.hidden, self.topk = x.device, x.shape[1], topk_idx.shape[1]


class StageKernel:
    """The staging kernel of one format of activations on one GPU, for all layers."""

    def __init__(self, form: StageFormat, device: torch.device) -> None:
        self.params = aligned(StageParams)
        self._most = BLOCKS_PER_SM * sm_count(device)
        with torch.cuda.device(device):
            loaded = load_kernel(StageSpec(form), device.index, param_bytes=ctypes.sizeof(StageParams))
        self.launcher = Launcher(loaded, self.params, threads=STAGE_THREADS, cooperative=False)
        self._lock = threading.Lock()

    def launch(self, raw: RawInputs, out: Outputs, masked: int, stream: int) -> None:
        """Enqueue it on a stream of its GPU, given by its raw handle; see `launch_stage`."""
        rows = -(-raw.tokens * (out.hidden // BLOCK) // HALF_WARPS)
        blocks = max(1, min(self._most, rows + -(-masked * out.topk // STAGE_THREADS)))
        with self._lock:
            params = self.params
            params.x, params.ids, params.weights = raw.x_at, raw.ids_at, raw.weights_at
            params.x_stride, params.ids_stride, params.weights_stride = raw.x_stride, raw.ids_stride, raw.weights_stride
            if raw.form is StageFormat.E4M3:
                params.x_scales = raw.scales_at
                params.scales_row, params.scales_column = raw.scales_row, raw.scales_column
            params.out_x, params.out_scales, params.out_ids, params.out_weights = out.addresses
            params.formats, params.weight_factor = raw.formats, raw.weight_factor
            params.tokens, params.masked, params.hidden, params.topk = raw.tokens, masked, out.hidden, out.topk
            self.launcher.launch(blocks, stream)


@functools.cache  # threads that come at once may each have one: what is loaded is the same
def stage_kernel(form: StageFormat, device: torch.device) -> StageKernel:
    """The kernel for activations of this format, loaded if it was not.

    Raises:
        MegaMoeError: it could not be compiled or loaded; see `fp8_mega_moe`.
    """
    return StageKernel(form, device)


def launch_stage(raw: RawInputs, out: Outputs, masked: int) -> None:
    """Enqueue the staging of a batch on the current stream.

    Args:
        raw: the batch; there is room for it.
        out: where to.
        masked: rows of ids and weights to write, at least the tokens: those from the tokens on get -1 and 0.
    """
    index = out.device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(out.device):
            launch_stage(raw, out, masked)
        return
    stage_kernel(raw.form, out.device).launch(raw, out, masked, torch._C._cuda_getCurrentRawStream(index))
