"""`NcclEpExchange`: rows by NCCL-EP (package nccl-extensions 0.1) to the ranks that have their experts.

Written against the package, whose own classes take what is asked here; it has not run. Of its layouts it is the flat
one of the high-throughput algorithm: rows with the numbers of a rank's experts, as many as the device counts, straight
into the buffer that the kernel reads.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._nodes.exchange import Arrived, Batch, Rows
from megamoe_jit._spec import BLOCK
from megamoe_jit._spec.checks import check

TESTED = ("0.1.0",)  #: releases of nccl-extensions whose classes take these calls
ROW_ALIGN = 16  #: bytes: codes and scales of a row lie at multiples of it


class NcclEpExchange:
    """An `Exchange` of NCCL-EP; each rank runs the kernel of its own experts alone. A collective of the group's ranks.

    Args:
        group: the process group of all ranks.
        num_experts: of all ranks.
        max_tokens: most tokens of a rank in a call, or in a chunk of one.
        hidden: columns of a token, a multiple of 512.
        max_num_sms: that its kernels may take; 0 leaves it to NCCL-EP.

    Raises:
        ConfigError: a size is no number of its kind, the package is not there, or a row of scales does not fill
            multiples of 16 bytes.
    """

    name = "nccl_ep"
    whole_node = False
    capturable = False  # it was never tried in a CUDA graph
    float32 = False

    def __init__(self, group: Any, num_experts: int, max_tokens: int, hidden: int, *, max_num_sms: int = 0) -> None:
        for what, size, least in (
            ("num_experts", num_experts, 1),
            ("max_tokens", max_tokens, 1),
            ("hidden", hidden, 1),
            ("max_num_sms", max_num_sms, 0),
        ):
            check(type(size) is int and size >= least, what, size, f"{least} or more")
        scales = hidden // BLOCK * 4
        if hidden % BLOCK or scales % ROW_ALIGN:
            raise ConfigError(f"hidden = {hidden} is not supported by NCCL-EP; allowed: a multiple of 512")
        try:
            self._ep = importlib.import_module("nccl.ep")
            interop = importlib.import_module("nccl.ep.interop.torch")
        except ImportError as error:
            allowed = "an environment with nccl-extensions, or another exchange"
            raise ConfigError(f"NCCL-EP cannot be imported ({error}); allowed: {allowed}") from error
        ep, self._ranks, self._max_tokens = self._ep, int(group.size()), max_tokens
        self._comm = interop.get_nccl_comm_from_group(group)
        config = ep.GroupConfig(
            algorithm=ep.Algorithm.HIGH_THROUGHPUT,
            num_experts=num_experts,
            max_dispatch_tokens_per_rank=max_tokens,
            max_recv_tokens_per_rank=self.most_rows(max_tokens),
            max_token_bytes=max(hidden + scales, 2 * hidden),
            max_num_sms=max_num_sms,
        )
        self._group = ep.Group.create(self._comm, config)
        self._free: list[Any] = []

    def most_rows(self, tokens: int) -> int:
        return self._ranks * self._max_tokens

    def dispatch(self, batch: Batch, into: Rows, first_expert: int, experts: int) -> Arrived:
        ep, device = self._ep, batch.rows.x.device
        stream, rows = _stream(device), self.most_rows(len(batch.rows))
        # all rows of the call, for those past the tokens are masked: what is sent has one shape
        ids, all_experts = batch.rows.topk_idx, experts * self._ranks
        ids = torch.where((ids >= 0) & (ids < all_experts), ids, -1)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        info = ep.LayoutInfo(recv_total_counter=ep.Tensor(count), recv_topk_idx_kind=ep.ExpertIdKind.LOCAL)
        handle = self._handle_for(ep.Tensor(ids), info, stream)
        arriving = into[:rows]
        handle.dispatch(
            ep.DispatchInputs(
                tokens=ep.Tensor(batch.rows.x),
                topk_weights=ep.Tensor(batch.rows.topk_weights),
                scales=ep.Tensor(batch.rows.x_sf),
            ),
            ep.DispatchOutputs(
                tokens=ep.Tensor(arriving.x),
                topk_weights=ep.Tensor(arriving.topk_weights),
                scales=ep.Tensor(arriving.x_sf),
                topk_idx=ep.Tensor(arriving.topk_idx),
            ),
            config=ep.DispatchConfig(quantization_recipe=ep.DispatchQuantizationRecipe.FWD),
            stream=stream,
        )
        return Arrived(rows, count, batch, (handle, ids))

    def combine(self, arrived: Arrived, partial: torch.Tensor, y: torch.Tensor) -> None:
        ep, (handle, _) = self._ep, arrived.state
        combined = partial.new_empty(len(arrived.batch.rows), partial.shape[1])
        inputs, outputs = ep.CombineInputs(tokens=ep.Tensor(partial)), ep.CombineOutputs(tokens=ep.Tensor(combined))
        handle.combine(inputs, outputs, stream=_stream(partial.device))
        y.copy_(combined[: y.shape[0]])
        self._free.append(handle)  # the next call on this stream may have it

    def _handle_for(self, ids: Any, info: Any, stream: int) -> Any:
        """A handle of a call; those of calls that are over are taken again, since making one allocates memory."""
        if self._free:
            handle = self._free.pop(0)
            handle.update(ids, layout_info=info, stream=stream)
            return handle
        return self._group.create_handle(self._ep.Layout.FLAT, ids, layout_info=info, stream=stream)

    def destroy(self) -> None:
        """Give back what NCCL-EP holds, once the device has nothing to do with it; a collective."""
        for handle in self._free:
            handle.destroy()
        self._group.destroy()


def _stream(device: torch.device) -> int:
    """The raw handle of the current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
