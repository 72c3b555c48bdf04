"""`SymmBuffer`: the memory of one rank's layer, and the kernels prepared for it.

A buffer is made once per layer shape and serves any token count up to its capacity, any variant, and any weights of
that shape.  It owns the parameter block of each kernel, so a steady-state call writes a few fields and launches.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._faults import decode, fault_error
from megamoe_jit._layout import MAX_SORT_BLOCKS, buffer_layout
from megamoe_jit._params import Params, aligned_params
from megamoe_jit._settings import get_settings
from megamoe_jit._spec import BLOCK, MAX_TOKENS, KernelSpec, MoEShape, Variant
from megamoe_jit._tma import BOX_ROWS_ACT, BOX_ROWS_WEIGHT, encode_fp8_rows
from megamoe_jit._validate import check_device

if TYPE_CHECKING:
    from megamoe_jit._launch import Launcher
    from megamoe_jit._weights import WeightPair
    from megamoe_jit.heuristics.select import Choice

__all__ = ["PreparedKernel", "SymmBuffer", "get_symm_buffer_for_mega_moe"]

PAIRS_PER_SORT_BLOCK = 2048


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class PreparedKernel:
    """One loaded kernel with the parameter block through which a buffer calls it."""

    def __init__(self, spec: KernelSpec, buffer: SymmBuffer) -> None:
        from megamoe_jit._launch import Launcher
        from megamoe_jit._loader import load_kernel

        self.spec = spec
        self.params: Params = aligned_params()
        loaded = load_kernel(spec, buffer.device.index, param_bytes=ctypes.sizeof(Params))
        self.launcher: Launcher = Launcher(loaded, self.params)
        self._weights: tuple[int, ...] = ()
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
        encode_fp8_rows(params.act1, params.act1_pool, rows, shape.hidden, BOX_ROWS_ACT)
        encode_fp8_rows(params.act2, params.act2_pool, rows, shape.intermediate, BOX_ROWS_ACT)
        params.pool_rows = rows
        params.rank = buffer.rank
        params.fault = buffer.fault.data_ptr()
        params.timeout_ns = int(get_settings().timeout_s * 1e9)

    def set_weights(self, l1: WeightPair, l2: WeightPair) -> None:
        """Point the kernel at these tensors; cheap when they are the last call's."""
        addresses = (l1[0].data_ptr(), l1[1].data_ptr(), l2[0].data_ptr(), l2[1].data_ptr())
        if addresses == self._weights:
            return
        params, shape, experts = self.params, self.spec.shape, self.spec.local_experts
        encode_fp8_rows(params.weight1, addresses[0], experts * 2 * shape.intermediate, shape.hidden, BOX_ROWS_WEIGHT)
        encode_fp8_rows(params.weight2, addresses[2], experts * shape.hidden, shape.intermediate, BOX_ROWS_WEIGHT)
        params.weight1_scales, params.weight2_scales = addresses[1], addresses[3]
        self._weights = addresses


class SymmBuffer:
    """Inputs, pools and result slots of one MoE layer on one rank.

    Stage inputs into the first T rows of the views before each call.  Rows past T never matter.

    Attributes:
        x: e4m3 ``[capacity, hidden]``, input codes.
        x_sf: float32 ``[capacity, hidden / 128]``, their scales.
        topk_idx: int64 ``[capacity, topk]``, expert of each slot, -1 for none.
        topk_weights: float32 ``[capacity, topk]``, router weight of each slot.
        buffer: the symmetric memory that holds these views, uint8.
        handle: has ``buffer_ptrs``, the address of every rank's symmetric memory.
        num_max_tokens_per_rank: capacity in tokens, rounded up to a multiple of 128.
        num_experts, num_topk, hidden, intermediate_hidden: the shape.
    """

    def __init__(self, shape: MoEShape, max_tokens: int, device: torch.device) -> None:
        if not 0 < max_tokens <= MAX_TOKENS:
            raise ConfigError(f"num_max_tokens_per_rank = {max_tokens} is not supported; allowed: 1 to {MAX_TOKENS}")
        check_device(device)
        self.shape, self.device = shape, device
        self.group: Any = None
        self.rank, self.ranks = 0, 1
        self.layout = layout = buffer_layout(shape, max_tokens, self.ranks)
        self.num_experts, self.num_topk = shape.experts, shape.topk
        self.hidden, self.intermediate_hidden = shape.hidden, shape.intermediate
        self.num_max_tokens_per_rank = layout.capacity
        self._check_memory()
        self.buffer = torch.empty(layout.symmetric_bytes, dtype=torch.uint8, device=device)
        self.local = torch.empty(layout.local_bytes, dtype=torch.uint8, device=device)
        for memory, name in ((self.buffer, "signals"), (self.local, "control")):
            section = layout.section(name)
            memory[section.offset : section.offset + section.bytes].zero_()
        self.handle = SimpleNamespace(buffer_ptrs=[self.buffer.data_ptr()])
        self.fault = torch.zeros(16, dtype=torch.int32, pin_memory=True)
        rows, topk = layout.capacity, shape.topk
        self.x = self._view("x", torch.float8_e4m3fn, (rows, shape.hidden))
        self.x_sf = self._view("x_scales", torch.float32, (rows, shape.hidden // BLOCK))
        self.topk_idx = self._view("topk_ids", torch.int64, (rows, topk))
        self.topk_weights = self._view("topk_weights", torch.float32, (rows, topk))
        self._prepared: dict[tuple[Variant, bool], PreparedKernel] = {}
        self._lock = threading.Lock()
        self._destroyed = False
        torch.cuda.synchronize(device)  # the control words are zero before any stream launches

    def _check_memory(self) -> None:
        free, _ = torch.cuda.mem_get_info(self.device)
        reusable = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        needed = self.layout.total_bytes
        if needed > free + reusable:
            raise ConfigError(
                f"a buffer for {self.layout.capacity} tokens of {self.shape} needs {needed} bytes and "
                f"{self.device} has {free + reusable} free; allowed: fewer tokens per rank"
            )

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        section = self.layout.section(name)
        used = math.prod(shape) * dtype.itemsize
        return self.buffer[section.offset : section.offset + used].view(dtype).view(shape)

    def _local_view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        section = self.layout.section(name)
        used = math.prod(shape) * dtype.itemsize
        return self.local[section.offset : section.offset + used].view(dtype).view(shape)

    @property
    def l1_acts(self) -> torch.Tensor:
        """e4m3 ``[pool_rows, hidden]``: dispatched rows by expert, for debugging."""
        return self._local_view("act1_pool", torch.float8_e4m3fn, (self.layout.pool_rows, self.hidden))

    @property
    def l1_acts_sf(self) -> torch.Tensor:
        """float32 ``[hidden / 128, pool_rows]``: their scales, for debugging."""
        return self._local_view("act1_scales", torch.float32, (self.hidden // BLOCK, self.layout.pool_rows))

    @property
    def l2_acts(self) -> torch.Tensor:
        """e4m3 ``[pool_rows, intermediate]``: rows after SwiGLU, for debugging."""
        return self._local_view("act2_pool", torch.float8_e4m3fn, (self.layout.pool_rows, self.intermediate_hidden))

    @property
    def l2_acts_sf(self) -> torch.Tensor:
        """float32 ``[intermediate / 128, pool_rows]``: their scales, for debugging."""
        return self._local_view(
            "act2_scales", torch.float32, (self.intermediate_hidden // BLOCK, self.layout.pool_rows)
        )

    def spec(self, variant: Variant, fast_math: bool) -> KernelSpec:
        """The kernel this buffer needs for a variant."""
        return KernelSpec(self.shape, variant, self.ranks, fast_math)

    def prepare(self, variant: Variant, fast_math: bool = True) -> PreparedKernel:
        """Compile, load and bind a kernel now, so that no later call has to (do this before graph capture).

        Raises:
            CaptureError: the current stream is capturing and the kernel is not loaded yet.
        """
        if self._destroyed:
            raise ConfigError("this buffer was destroyed; allowed: calls before destroy()")
        key = (variant, fast_math)
        prepared = self._prepared.get(key)
        if prepared is None:
            with torch.cuda.device(self.device):
                prepared = PreparedKernel(self.spec(variant, fast_math), self)
            self._prepared[key] = prepared
        return prepared

    def launch(
        self,
        prepared: PreparedKernel,
        choice: Choice,
        *,
        y: torch.Tensor,
        tokens: int,
        stats: torch.Tensor | None,
        clamp: float,
        num_sms: int,
    ) -> None:
        """Launch a prepared kernel on the current stream; the arguments are already checked."""
        with self._lock:
            params = prepared.params
            params.y = y.data_ptr()
            params.stats = 0 if stats is None else stats.data_ptr()
            params.tokens = tokens
            params.clamp = clamp
            params.lag_tiles, params.rows_per_item = choice.lag_tiles, choice.rows_per_item
            pairs = tokens * self.num_topk
            params.sort_blocks = max(1, min(num_sms, MAX_SORT_BLOCKS, -(-pairs // PAIRS_PER_SORT_BLOCK)))
            prepared.launcher.launch(num_sms, torch.cuda.current_stream(self.device).cuda_stream)

    def check(self) -> None:
        """Wait for the device and raise if a kernel of this buffer gave up.

        Raises:
            DeviceFaultError: a wait inside a kernel passed its deadline, or the CUDA context is broken.
            PeerTimeoutError: the same, and it waited for other ranks.
        """
        cause = "no error"
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
        fault = decode(self.fault.tolist())
        if fault is not None or cause != "no error":
            raise fault_error(fault, self.rank, cause)

    def destroy(self) -> None:
        """Give the memory back; safe to call twice.  No call may be running."""
        if self._destroyed:
            return
        self._destroyed = True
        self._prepared.clear()
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.buffer = self.local = empty
        self.x = self.x_sf = self.topk_idx = self.topk_weights = empty

    def __enter__(self) -> SymmBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


def get_symm_buffer_for_mega_moe(
    group: Any,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool = True,
    activation: str = "swiglu",
    *,
    device: torch.device | str | int | None = None,
) -> SymmBuffer:
    """Allocate the buffer of one rank.

    Args:
        group: None or a process group of one rank: plain CUDA memory, torch.distributed is not needed.
        num_experts: experts of all ranks.
        num_max_tokens_per_rank: most tokens of a call; rounded up to a multiple of 128.
        num_topk: slots of a token, 1 to 32.
        hidden: a multiple of 128.
        intermediate_hidden: a multiple of 128.
        use_fp8_dispatch: must be True.
        activation: must be "swiglu".
        device: where; the current CUDA device by default.

    Raises:
        ConfigError: a value is not supported, or the memory is not there (says the bytes).
        UnsupportedDeviceError: the device is not a Hopper GPU.
    """
    ranks = 1 if group is None else int(group.size())
    if ranks != 1:
        raise ConfigError(f"group has {ranks} ranks; allowed: None or a group of one rank")
    if not use_fp8_dispatch:
        raise ConfigError("use_fp8_dispatch = False is not supported; allowed: True")
    if activation != "swiglu":
        raise ConfigError(f"activation = {activation!r} is not supported; allowed: 'swiglu'")
    shape = MoEShape(hidden, intermediate_hidden, num_experts, num_topk)
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available; allowed: a Hopper GPU with its driver")
    where = (
        torch.device("cuda" if device is None else device)
        if not isinstance(device, int)
        else torch.device("cuda", device)
    )
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    buffer = SymmBuffer(shape, num_max_tokens_per_rank, where)
    buffer.group = group
    return buffer
