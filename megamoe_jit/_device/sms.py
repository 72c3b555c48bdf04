"""How many streaming multiprocessors (SMs) a device has: what the blocks of every launch are counted by."""

from __future__ import annotations

import functools

import torch


@functools.cache
def sm_count(device: torch.device) -> int:
    """SMs of a CUDA device, asked once."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
