"""Waiting for the GPU without waiting for ever.

A kernel that gives up leaves a record in host memory and ends itself by a fault, and the driver then ends every wait of
the host with an error.  But a driver can lose a fault (`kernels_src/comm/fault.cuh` has figures): then
`torch.cuda.synchronize` never returns.  The record is there all the same, so whoever waits looks at it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from megamoe_jit._device.fault import LOST
from megamoe_jit._text import first_line

__all__ = ["wait_for_device"]

GRACE_S = 10.0  #: for the driver to report a fault after its record was seen; it was never seen to take more than 4
LOOK_S = 0.05  #: between two looks at the record


def wait_for_device(device: torch.device, has_record: Callable[[], bool]) -> str | None:
    """Wait for all work on the device; the first line of the driver's error, or None if there is none.

    Where a record appears and the driver has reported nothing after `GRACE_S`, return `LOST`.
    """
    errors: list[Exception] = []
    over = threading.Event()

    def wait() -> None:
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=wait, name="megamoe-jit waits for the GPU", daemon=True).start()
    while not over.wait(LOOK_S):
        if has_record() and not over.wait(GRACE_S):
            return LOST
    if errors and not isinstance(errors[0], RuntimeError):
        raise errors[0]
    return first_line(errors[0]) if errors else None
