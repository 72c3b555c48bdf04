"""Memory that outlasts an engine's sleep.

Engines that can sleep (vLLM's sleep mode, SGLang's memory saver) have a pool for whatever a thread allocates while it
loads a model. They give its memory up, and when they wake other memory lies at the same addresses. Weights are loaded
again then, but nobody brings back what a launch leaves in a buffer for the next one, which would wait for ever. A pool
is of one thread, so buffers are made by another.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from megamoe_jit._device.capture import refuse_capture

_T = TypeVar("_T")


def made_apart(make: Callable[[], _T]) -> _T:
    """What `make` makes, with its memory outside of the pools of the calling thread.

    Args:
        make: called with the device of this thread, and neither its modes of torch nor its streams.

    Raises:
        CaptureError: the current stream is capturing, which another thread's would not show.
        Exception: whatever `make` raises.
    """
    refuse_capture("a buffer cannot be made", "make it before the capture")
    if not torch.cuda.is_available():
        return make()
    device = torch.cuda.current_device()

    def on_device() -> _T:
        torch.cuda.set_device(device)
        torch.cuda.mem_get_info()  # makes its context current, which for the first device torch leaves to later calls
        return make()

    with ThreadPoolExecutor(1, "megamoe-jit") as other:
        return other.submit(on_device).result()
