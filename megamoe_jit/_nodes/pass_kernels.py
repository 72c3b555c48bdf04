"""`PassKernels`: the passes over rows between nodes on a GPU, a launch each; it alone writes `NodesParams`."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from megamoe_jit._device.launch import Launcher
from megamoe_jit._device.load import load_kernel
from megamoe_jit._device.params import NodesParams, aligned
from megamoe_jit._device.sms import sm_count
from megamoe_jit._nodes.exchange import Rows
from megamoe_jit._nodes.passes import Routes
from megamoe_jit._spec.abi import NODES_THREADS, WARP
from megamoe_jit._spec.any_layer import Pass, PassSpec

BLOCKS_PER_SM = 6  #: as many as fit
WARPS = NODES_THREADS // WARP  #: each has a row at a time
NUMBERS = 8  #: of a thread that sums


class PassKernels:
    """The functions of `TorchPasses`, as launches on the current stream of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._params = device, aligned(NodesParams)
        self._lock = threading.Lock()
        self._most = BLOCKS_PER_SM * sm_count(device)
        with torch.cuda.device(device):
            self._launchers = {step: self._loaded(step) for step in Pass}

    def _loaded(self, step: Pass) -> Launcher:
        loaded = load_kernel(PassSpec(step), self._device.index, param_bytes=ctypes.sizeof(NodesParams))
        return Launcher(loaded, self._params, threads=NODES_THREADS, cooperative=False)

    def _launch(self, step: Pass, blocks: int, **fields: Any) -> None:
        index = self._device.index
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(self._device):
                self._launch(step, blocks, **fields)
            return
        with self._lock:
            params = self._params
            for name, value in fields.items():
                setattr(params, name, value)
            self._launchers[step].launch(blocks, torch._C._cuda_getCurrentRawStream(index))

    def _by_warps(self, step: Pass, warps: int, of: Rows, **fields: Any) -> None:
        parts, words = zip(*((t.data_ptr(), t.shape[1] * t.itemsize // 4) for t in of.tensors), strict=True)
        blocks = min(self._most, -(-warps // WARPS))
        self._launch(step, blocks, parts=parts, part_words=words, topk=of.topk_idx.shape[1], **fields)

    def route(self, ids: torch.Tensor, nodes: int, experts: int) -> Routes:
        tokens, topk = ids.shape
        places = torch.empty(nodes, tokens, dtype=torch.int32, device=ids.device)
        counts = torch.empty(nodes, dtype=torch.int64, device=ids.device)
        at = {"parts": (0, 0, ids.data_ptr(), 0), "places": places.data_ptr(), "counts": counts.data_ptr()}
        self._launch(Pass.ROUTE, nodes, tokens=tokens, topk=topk, experts=experts, **at)
        return Routes(places, counts)

    def pack(self, rows: Rows, routes: Routes) -> torch.Tensor:
        nodes, tokens = routes.places.shape
        most = tokens * min(nodes, rows.topk_idx.shape[1])
        words = sum(tensor.shape[1] * tensor.itemsize for tensor in rows.tensors) // 4
        packed = torch.empty(most, words, dtype=torch.int32, device=rows.x.device)
        if tokens:
            at = {"places": routes.places.data_ptr(), "counts": routes.counts.data_ptr()}
            more = {"packed": packed.data_ptr(), "nodes": nodes, "tokens": tokens}
            self._by_warps(Pass.PACK, nodes * tokens, rows, **at, **more)
        return packed

    def unpack(self, packed: torch.Tensor, into: Rows, first_expert: int) -> None:
        rows = len(packed)
        if rows:
            more = {"packed": packed.data_ptr(), "rows": rows, "first_expert": first_expert}
            self._by_warps(Pass.UNPACK, rows, into, **more)

    def sum_nodes(self, back: torch.Tensor, y: torch.Tensor, nodes: int, routes: Routes | None = None) -> None:
        tokens, hidden = y.shape
        if not tokens:
            return
        step = Pass.SUM_FP32 if back.dtype is torch.float32 else Pass.SUM_BF16
        places, counts = (0, 0) if routes is None else (routes.places.data_ptr(), routes.counts.data_ptr())
        sizes = {"nodes": nodes, "tokens": tokens, "hidden": hidden, "rows": len(back) // nodes}
        at = {"back": back.data_ptr(), "y": y.data_ptr(), "places": places, "counts": counts}
        self._launch(step, -(-tokens * hidden // (NUMBERS * NODES_THREADS)), **sizes, **at)


@functools.cache  # threads that come at once may each have one: what is loaded is the same
def pass_kernels(device: torch.device) -> PassKernels:
    """Those of a GPU, loaded if they were not.

    Raises:
        MegaMoeError: one could not be compiled or loaded; see `fp8_mega_moe`.
    """
    return PassKernels(device)
