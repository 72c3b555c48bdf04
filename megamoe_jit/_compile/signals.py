"""Signals during NVRTC's first compilation in a process.

In that one, and in no other, NVRTC has handlers of its own for SIGINT and SIGTERM (seen with 12.9: for 85 ms with a
kernel of ours, 16 ms with the source below). They end the process with status 4 and without a word, past Python's.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from megamoe_jit._fork import renew_after_fork

_ENDING = {signal.SIGINT, signal.SIGTERM}
_SOURCE = b'extern "C" __global__ void nothing() {}'

_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_settled = False


def settle(nvrtc: Any, options: list[bytes]) -> None:
    """Get over the first compilation, with a source that takes no time and these options.

    This thread puts such signals off meanwhile; most often it is the one that gets them. Another can still be hit, for
    16 ms.
    """
    global _settled
    with _lock:
        if _settled:
            return
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            _, program = nvrtc.nvrtcCreateProgram(_SOURCE, b"", 0, [], [])
            nvrtc.nvrtcCompileProgram(program, len(options), options)  # the next one says what is wrong, if anything is
            nvrtc.nvrtcDestroyProgram(program)
            _settled = True
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
