"""Operators of vLLM's library for MoE layers, without the rest of vLLM.

`_moe_C_stable_libtorch.abi3.so` of the wheel is built against torch's stable ABI and loads in torch 2.11 too. It is
found where `VLLM_MOE_LIBRARY` says, else in the installed package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIBRARY = "_moe_C_stable_libtorch.abi3.so"
VARIABLE = "VLLM_MOE_LIBRARY"


@functools.cache
def ops() -> Any:
    """The operators; raises `ImportError` where there is no library, and `OSError` where it does not load."""
    named = os.environ.get(VARIABLE)
    if named is None:
        found = importlib.util.find_spec("vllm")
        if found is None or not found.submodule_search_locations:
            raise ImportError(f"vLLM is not installed, and {VARIABLE} does not name its {LIBRARY}")
        named = str(Path(found.submodule_search_locations[0]) / LIBRARY)
    known: Any = torch.ops
    known.load_library(named)
    return known._moe_C


def aligned(topk_idx: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots in the order of their experts, each expert's filled up to whole blocks.

    Args:
        topk_idx: int32 ``[T, K]``.
        experts: how many there are.
        block: rows of a block.

    Returns:
        Slots int32 ``[P]`` (T * K is none), the expert of each block int32 ``[P / block]``, and how many of the slots
        count int32 ``[1]``.
    """
    count = topk_idx.numel()
    most = count + experts * (block - 1)
    if count < experts:
        most = min(count * block, most)
    slots, owners, used = (
        torch.empty(size, dtype=torch.int32, device=topk_idx.device) for size in (most, -(-most // block), 1)
    )
    ops().moe_align_block_size(topk_idx, experts, block, slots, owners, used, None, None)
    return slots, owners, used


def grouped(topk_idx: torch.Tensor, experts: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Sorts the slots by expert at each call, in memory of its own.

    Args:
        topk_idx: int32 ``[T, K]``.
        experts: how many there are.

    Returns:
        What gives where each expert's slots begin int64 ``[experts + 1]``, and the place of each slot int32 ``[T, K]``.
    """
    count, device = topk_idx.numel(), topk_idx.device
    numbers = torch.arange(count, dtype=torch.int32, device=device).view_as(topk_idx)
    ends = torch.empty(experts + 1, dtype=torch.int64, device=device)
    places, by_expert, rows, copy = (torch.empty_like(topk_idx) for _ in range(4))
    scratch = torch.empty(ops().moe_permute_sort_workspace_size(count, experts), dtype=torch.int8, device=device)

    def sort() -> tuple[torch.Tensor, torch.Tensor]:
        sizes = experts, experts
        ops().moe_prepare_scatter(topk_idx, numbers, None, *sizes, ends, places, scratch, by_expert, rows, copy)
        return ends, places

    return sort
