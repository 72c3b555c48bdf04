"""Operators of vLLM's library for MoE layers, without the rest of vLLM.

`_moe_C_stable_libtorch.abi3.so` of the wheel is built against torch's stable ABI and loads in torch 2.11 too. It is
found where `VLLM_MOE_LIBRARY` says, else in the installed package.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["LIBRARY", "aligned", "ops"]

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
