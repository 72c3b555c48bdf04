"""CUDA graph capture: what allocates or waits is refused in it, before anything is touched, so that it stays usable.

Whether there is one is asked of the current stream alone: of captures on other streams of the process nothing is known.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from megamoe_jit._errors import CaptureError

_ACTIVE = 1  #: CU_STREAM_CAPTURE_STATUS_ACTIVE


def is_capturing() -> bool:
    """Whether the current stream is capturing; False where torch cannot say, because CUDA is broken or not there."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # whatever comes next reports it
        return False


def capture_id(stream: int) -> int | None:
    """The capture that a stream (its raw handle) takes part in, by a number that no other in this process has.

    None if it takes part in none, or the driver does not say.  Branches of one graph are streams of one capture.
    """
    if stream == 0:  # the legacy stream takes part in none, and to ask while another one captures is an error
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    try:
        refused = _capture_info()(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    except (OSError, AttributeError):  # no driver, or one that is too old
        return None
    return None if refused or status.value != _ACTIVE else number.value


@functools.cache
def _capture_info() -> Any:
    """`cuStreamGetCaptureInfo` of the driver itself; the bindings ask for edges too, which it may refuse to tell."""
    function = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    function.argtypes = (ctypes.c_void_p,) * 6
    function.restype = ctypes.c_int
    return function


def refuse_capture(what: str, next_step: str) -> None:
    """Raise `CaptureError` if the current stream is capturing.

    Args:
        what: that cannot be done then; the beginning of the message.
        next_step: what to do instead; its end.
    """
    if is_capturing():
        raise CaptureError(f"{what} while a CUDA graph is being captured on the current stream; {next_step}")
