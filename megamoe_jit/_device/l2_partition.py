"""Which half of the L2 each SM is next to.

The L2 of an H100 or H200 has two halves. An SM reads through the near one, and what SMs of both halves read lies in
both. A kernel that knows the halves lets each read its own share of the weights (`kernels_src/sched/order.cuh`). No
interface tells them, and chips differ, so it is measured: an atomic is done in the half that owns its line, so its
latency says whether that is the near one. A pattern of near and far lines is common to all SMs of a half.

The measuring kernel is PTX, which the driver compiles by itself: where kernels come from a cache there may be no
compiler. It takes a few milliseconds, once per process and device; a measurement that failed, or did not reach every
SM, is tried again when the next kernel is bound to a buffer, three times in all. Results do not depend on what it
finds.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import Any

import torch

from megamoe_jit._device.driver import checked
from megamoe_jit._device.sms import sm_count
from megamoe_jit._errors import LoadError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._spec.abi import SIDE_WORDS

LOG = logging.getLogger("megamoe_jit")

LINES = 96  #: lines whose latency is measured
STRIDE = 4224  #: bytes from one to the next: not a power of two, so that they are spread over both halves
ROUNDS = 6  #: of each line, of which the quickest counts
MOST_SMS = 32 * SIDE_WORDS
SHARED_BYTES = 200 << 10  #: so much that no SM has room for two blocks
MOST_TRIES = 3  #: of a measurement that does not succeed
ALIKE = 0.5  #: least correlation, in absolute value, of an SM with the first one

PROBE = f"""
.version 7.8
.target sm_90
.address_size 64

// One thread per block: the least latency of an atomic on each line, from a line that differs from SM to SM.
.visible .entry l2_sides_probe(.param .u64 lines_at, .param .u64 latencies_at)
{{
    .reg .pred %again, %never;
    .reg .b32 %sm, %i, %line, %round, %from, %to, %took, %least, %old;
    .reg .b64 %lines, %latencies, %at, %out;
    ld.param.u64 %lines, [lines_at];
    ld.param.u64 %latencies, [latencies_at];
    mov.u32 %sm, %smid;
    setp.ge.u32 %never, %sm, {MOST_SMS};
    @%never ret;
    mov.u32 %i, 0;
NEXT_LINE:
    add.u32 %line, %i, %sm;
    rem.u32 %line, %line, {LINES};
    mul.wide.u32 %at, %line, {STRIDE};
    add.u64 %at, %at, %lines;
    mad.lo.u32 %line, %sm, {LINES}, %line;
    mul.wide.u32 %out, %line, 4;
    add.u64 %out, %out, %latencies;
    mov.u32 %least, 0xffffffff;
    mov.u32 %round, 0;
NEXT_ROUND:
    mov.u32 %from, %clock;
    atom.global.add.u32 %old, [%at], 0;
    setp.eq.u32 %never, %old, 1;        // the lines are zero: this only waits for the answer
    @%never st.global.u32 [%out], %old;
    mov.u32 %to, %clock;
    sub.u32 %took, %to, %from;
    min.u32 %least, %least, %took;
    add.u32 %round, %round, 1;
    setp.lt.u32 %again, %round, {ROUNDS};
    @%again bra NEXT_ROUND;
    st.global.u32 [%out], %least;
    add.u32 %i, %i, 1;
    setp.lt.u32 %again, %i, {LINES};
    @%again bra NEXT_LINE;
    ret;
}}
"""

_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_known: dict[int, tuple[int, ...] | None] = {}
_failed: dict[int, int] = {}
_modules: list[Any] = []  # never unloaded: somebody may be capturing a graph


def sides_of_sms(device: torch.device) -> tuple[int, ...] | None:
    """A bit for each SM, in words of 32: the half of the L2 it is next to, or None if that cannot be told.

    None too while the current stream is capturing a graph, unless it has been measured before. Both halves get as
    many SMs, give or take one: where a chip has more on one side, some count as of the other.

    Args:
        device: a CUDA device whose context is current; its current stream is waited for.
    """
    with _lock:
        if device.index in _known:
            return _known[device.index]
        if torch.cuda.is_current_stream_capturing():
            return None
        try:
            words = split(_measured(device))
            if words is None:
                LOG.info("the L2 of device %s shows no two halves; every SM takes tiles of all columns", device.index)
        except (LoadError, RuntimeError, ImportError) as error:
            LOG.info("the halves of the L2 of device %s cannot be measured: %s", device.index, error)
            _failed[device.index] = _failed.get(device.index, 0) + 1
            if _failed[device.index] < MOST_TRIES:
                return None
            words = None
        _known[device.index] = words
        return words


def _measured(device: torch.device) -> torch.Tensor:
    sms = sm_count(device)
    latencies = _latencies(device, sms)
    reached = len(_reached(latencies))
    if reached != sms:
        raise LoadError(f"{reached} of {sms} SMs were reached")
    return latencies


def _reached(latencies: torch.Tensor) -> torch.Tensor:
    return latencies.ne(0).all(dim=1).nonzero().flatten()


def split(latencies: torch.Tensor) -> tuple[int, ...] | None:
    """Tell two groups of SMs apart by the lines that are near to them.

    Args:
        latencies: ``[MOST_SMS, lines]``, any unit; a row of zeros is no SM.

    Returns:
        Bit ``i % 32`` of word ``i // 32`` is the group of SM i; None unless all SMs fall into two groups of about the
        same size.
    """
    reached = _reached(latencies)
    sms = len(reached)
    if sms < 2:
        return None
    pattern = latencies[reached].double()
    pattern = pattern - pattern.mean(dim=1, keepdim=True)
    pattern = pattern - pattern.mean(dim=0, keepdim=True)
    pattern = pattern / pattern.norm(dim=1, keepdim=True).clamp_min(1e-9)
    alike = pattern @ pattern[0]
    near = int((alike > 0).sum())
    if float(alike.abs().min()) < ALIKE or not 0.4 * sms <= near <= 0.6 * sms:
        return None
    words = [0] * SIDE_WORDS
    for sm in reached[alike.argsort()[: sms // 2]].tolist():
        words[sm // 32] |= 1 << sm % 32
    return tuple(words)


def _latencies(device: torch.device, sms: int) -> torch.Tensor:
    """Cycles of an atomic, ``[MOST_SMS, LINES]`` on the CPU; zeros for what is no SM."""
    from cuda.bindings import driver

    lines = torch.zeros(LINES * STRIDE // 4, dtype=torch.int32, device=device)
    latencies = torch.zeros(MOST_SMS, LINES, dtype=torch.int32, device=device)
    module = checked(driver, driver.cuModuleLoadData(PROBE.encode() + b"\0"), "cuModuleLoadData")
    _modules.append(module)
    function = checked(driver, driver.cuModuleGetFunction(module, b"l2_sides_probe"), "cuModuleGetFunction")
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver, driver.cuFuncSetAttribute(function, limit, SHARED_BYTES), "cuFuncSetAttribute")
    arguments = ((lines.data_ptr(), latencies.data_ptr()), (ctypes.c_void_p, ctypes.c_void_p))
    stream = torch.cuda.current_stream(device).cuda_stream
    launched = driver.cuLaunchKernel(function, sms, 1, 1, 1, 1, 1, SHARED_BYTES, stream, arguments, 0)
    checked(driver, launched, "cuLaunchKernel")
    return latencies.cpu()
