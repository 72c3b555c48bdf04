"""The memory of one rank's layer: what is admitted, how much it takes, and the views that callers see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from megamoe_jit._compile.render import sources_digest
from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._device.layout import MIN_POOL_ROWS, BufferLayout, buffer_layout
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.checks import check_device
from megamoe_jit._layer.group import collectively, group_rank, group_size, require_equal
from megamoe_jit._layer.symmetric import allocate_symmetric
from megamoe_jit._spec import BLOCK, MAX_TOKENS, KernelSpec, MoEShape, Variant
from megamoe_jit._spec.checks import check
from megamoe_jit._text import first_line
from megamoe_jit._version import __version__


@dataclass(frozen=True, slots=True)
class Place:
    """What a kernel has to know of a memory: sizes and addresses, which keep nothing alive."""

    shape: MoEShape
    device: torch.device
    rank: int  #: whose memory it is
    ranks: int  #: how many share the experts
    layout: BufferLayout  #: where its sections are
    local: int  #: address of what this rank alone uses
    peers: tuple[int, ...]  #: addresses of every rank's symmetric memory
    fault: int  #: address of the record of a kernel that gave up


class LayerMemory:
    """Inputs, pools and result slots of one MoE layer on one rank; a collective of all ranks of the group."""

    handle: Any

    def __init__(self, shape: MoEShape, max_tokens: int, device: torch.device, group: Any, max_pool_rows: int) -> None:
        refuse_capture("a buffer cannot be made", "make it before the capture")
        self.shape, self.device, self.group = shape, device, group
        self.rank, self.ranks = group_rank(group), group_size(group)
        fingerprint = collectively(group, "checking the layer", lambda: self._admit(max_tokens, max_pool_rows))
        self.layout = layout = buffer_layout(shape, max_tokens, self.ranks, max_pool_rows)
        self.num_experts, self.num_topk, self.num_shared_experts = shape.experts, shape.topk, shape.shared
        self.hidden, self.intermediate_hidden = shape.hidden, shape.intermediate
        self.num_max_tokens_per_rank = layout.capacity
        if self.ranks > 1:
            require_equal(group, "the layer", {**fingerprint, "num_max_tokens_per_rank": layout.capacity})
        collectively(group, "checking the memory", self._check_memory)
        with torch.inference_mode(False):  # tensors made in it could not be written outside
            self._allocate()
            rows, topk = layout.capacity, shape.topk
            self.x = self._view(self.buffer, "x", torch.float8_e4m3fn, (rows, shape.hidden))
            self.x_sf = self._view(self.buffer, "x_scales", torch.float32, (rows, shape.hidden // BLOCK))
            self.topk_idx = self._view(self.buffer, "topk_ids", torch.int64, (rows, topk))
            self.topk_weights = self._view(self.buffer, "topk_weights", torch.float32, (rows, topk))

    @property
    def place(self) -> Place:
        """Where everything is."""
        return Place(
            *(self.shape, self.device, self.rank, self.ranks, self.layout),
            local=self.local.data_ptr(),
            peers=tuple(self.handle.buffer_ptrs),
            fault=self.fault.data_ptr(),
        )

    def _admit(self, max_tokens: int, max_pool_rows: int) -> dict[str, object]:
        """Refuse what no kernel supports, before anything is allocated; what all ranks must have in common."""
        check(0 < max_tokens <= MAX_TOKENS, "num_max_tokens_per_rank", max_tokens, f"1 to {MAX_TOKENS}")
        check(max_pool_rows >= MIN_POOL_ROWS, "max_pool_rows", max_pool_rows, f"{MIN_POOL_ROWS} or more")
        check_device(self.device)
        KernelSpec(self.shape, Variant.COOPERATIVE, self.ranks)
        if self.ranks == 1:
            return {}
        return {
            "num_experts": self.shape.experts,
            "num_topk": self.shape.topk,
            "num_shared_experts": self.shape.shared,
            "hidden": self.shape.hidden,
            "intermediate_hidden": self.shape.intermediate,
            "package version": __version__,
            "kernel sources": sources_digest()[:16],
        }

    def _allocate(self) -> None:
        layout, device = self.layout, self.device
        if self.ranks > 1:
            self.buffer, self.handle = allocate_symmetric(
                self.group, layout.symmetric_bytes, device, lambda why: ConfigError(self._too_large(why))
            )

        def allocate() -> None:
            try:
                if self.ranks == 1:
                    self.buffer = torch.empty(layout.symmetric_bytes, dtype=torch.uint8, device=device)
                    self.handle = SimpleNamespace(buffer_ptrs=[self.buffer.data_ptr()])
                self.local = torch.empty(layout.local_bytes, dtype=torch.uint8, device=device)
                self.fault = torch.zeros(16, dtype=torch.int32, device="cpu", pin_memory=True)
            except torch.OutOfMemoryError as error:
                raise ConfigError(self._too_large(first_line(error))) from None
            for memory, name in ((self.buffer, "signals"), (self.local, "control")):
                section = layout.section(name)
                memory[section.offset : section.offset + section.bytes].zero_()
            torch.cuda.synchronize(device)  # the control words are zero before any stream, or peer, launches

        collectively(self.group, "allocating the buffer", allocate)

    def _check_memory(self) -> None:
        if self.ranks > 1:
            torch.cuda.empty_cache()  # symmetric memory comes from the driver, not out of torch's cache
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.ranks > 1 and self.layout.symmetric_bytes > free:
            needed = f"{self.layout.symmetric_bytes} of them symmetric"
            raise ConfigError(self._too_large(f"{needed}, and {self.device} has {free} free beside torch's cache"))
        reusable = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if self.layout.total_bytes > free + reusable:
            raise ConfigError(self._too_large(f"{self.device} has {free + reusable} free"))

    def _too_large(self, why: str) -> str:
        layout = self.layout
        needs = f"a buffer for {layout.capacity} tokens of {self.shape} needs {layout.total_bytes} bytes"
        return f"{needs}: {why}; allowed: fewer tokens per rank"

    def _view(self, memory: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        section = self.layout.section(name)
        used = math.prod(shape) * dtype.itemsize
        return memory[section.offset : section.offset + used].view(dtype).view(shape)

    @property
    def l1_acts(self) -> torch.Tensor:
        """e4m3 ``[pool_rows, hidden]``: dispatched rows by expert, for debugging."""
        return self._view(self.local, "act1_pool", torch.float8_e4m3fn, (self.layout.pool_rows, self.hidden))

    @property
    def l1_acts_sf(self) -> torch.Tensor:
        """float32 ``[hidden / 128, pool_rows]``: their scales, for debugging."""
        return self._view(self.local, "act1_scales", torch.float32, (self.hidden // BLOCK, self.layout.pool_rows))

    @property
    def l2_acts(self) -> torch.Tensor:
        """e4m3 ``[pool_rows, intermediate]``: rows after SwiGLU, for debugging."""
        return self._view(
            self.local, "act2_pool", torch.float8_e4m3fn, (self.layout.pool_rows, self.intermediate_hidden)
        )

    @property
    def l2_acts_sf(self) -> torch.Tensor:
        """float32 ``[intermediate / 128, pool_rows]``: their scales, for debugging."""
        return self._view(
            self.local, "act2_scales", torch.float32, (self.intermediate_hidden // BLOCK, self.layout.pool_rows)
        )


def mask_rows(topk_idx: torch.Tensor, num_rows: torch.Tensor) -> None:
    """Mask rows from a count on that the device alone knows.

    Args:
        topk_idx: int64 ``[rows, topk]``, written.
        num_rows: int32, uint32 or int64 ``[1]``.
    """
    row = torch.arange(topk_idx.shape[0], dtype=torch.int64, device=topk_idx.device)
    topk_idx.masked_fill_((row >= num_rows.to(torch.int64))[:, None], -1)
