"""What NVML says of GPUs that this process does not see.

`CUDA_VISIBLE_DEVICES` hides GPUs from CUDA but not from NVML; a container that was given one GPU alone hides the others
from both.
"""

from __future__ import annotations

import ctypes
from typing import Any

_READ, _WRITE = 0, 1  #: nvmlGpuP2PCapsIndex_t
_OK, _UNKNOWN = 0, 6  #: nvmlGpuP2PStatus_t


def peer_access(one: str, other: str) -> bool | None:
    """Whether a GPU may read and write the memory of another; None where NVML cannot tell.

    Args:
        one, other: their UUIDs, without the prefix ``GPU-``.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return None
        try:
            return _status(nvml, one, other)
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or one without such a function
        return None


def _status(nvml: Any, *uuids: str) -> bool | None:
    handles = [ctypes.c_void_p() for _ in uuids]
    for uuid, handle in zip(uuids, handles, strict=True):
        if nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)):
            return None
    for capability in (_READ, _WRITE):
        status = ctypes.c_int(_UNKNOWN)
        if nvml.nvmlDeviceGetP2PStatus(*handles, capability, ctypes.byref(status)) or status.value == _UNKNOWN:
            return None
        if status.value != _OK:
            return False
    return True
