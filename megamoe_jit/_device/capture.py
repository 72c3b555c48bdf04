"""CUDA graph capture: what allocates or waits is refused in it, before anything is touched, so that it stays usable.

Only the current stream can be asked; of captures on other streams of the process nothing is known here.
"""

from __future__ import annotations

import torch

from megamoe_jit._errors import CaptureError

__all__ = ["is_capturing", "refuse_capture"]


def is_capturing() -> bool:
    """Whether the current stream is capturing; False where torch cannot say, because CUDA is broken or not there."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # whatever comes next reports it
        return False


def refuse_capture(what: str, next_step: str) -> None:
    """Raise `CaptureError` if the current stream is capturing.

    Args:
        what: that cannot be done then; the beginning of the message.
        next_step: what to do instead; its end.
    """
    if is_capturing():
        raise CaptureError(f"{what} while a CUDA graph is being captured on the current stream; {next_step}")
