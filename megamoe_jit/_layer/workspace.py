"""Workspaces: the buffer that layers share, who uses it, and the name by which operators find it.

Layers of one model run one after the other, so one buffer serves all that have the same device, shape and capacity. A
layer holds a `Lease` of its workspace. The registry itself holds nothing: what nobody leases any more is collected like
any object, and the last lease that is released frees the memory at once.

Layers of different shapes have buffers of their own, even where the sizes would do: sections lie elsewhere, and kernels
are bound to addresses. The layers of one model have one shape, or two.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any, Literal

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._device.layout import CAPACITY_STEP
from megamoe_jit._errors import CaptureError, ConfigError, MegaMoeError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.calls import get_symm_buffer_for_mega_moe
from megamoe_jit._layer.marks import LAYOUT
from megamoe_jit._spec import MAX_TOKENS, MoEShape, check_int
from megamoe_jit._spec.checks import check
from megamoe_jit._text import counted, shown

Kind = Literal["shared", "own", "given"]


class Workspace:
    """A buffer and the leases of it."""

    def __init__(self, name: str, kind: Kind, buffer: SymmBuffer, max_tokens: int) -> None:
        self.name, self.kind, self.buffer, self.max_tokens = name, kind, buffer, max_tokens
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()


_lock = threading.Lock()
renew_after_fork(globals(), "_lock")
_named: weakref.WeakValueDictionary[str, Workspace] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Lease:
    """One layer's use of a workspace, until it is released or forgotten."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace: Workspace | None = workspace
        self.held: SymmBuffer | None = workspace.buffer  #: None once `buffer` raises; for calls, which have no time
        self.name, self.kind = workspace.name, workspace.kind
        self.shape, self.capacity = workspace.buffer.shape, workspace.buffer.num_max_tokens_per_rank
        workspace.leases.add(self)

    @property
    def buffer(self) -> SymmBuffer:
        """The workspace's buffer; raises `ConfigError` once this lease was released while others were not."""
        return self._held().buffer

    def _held(self) -> Workspace:
        if self._workspace is None:
            raise ConfigError("this layer was destroyed; allowed: calls before destroy()")
        return self._workspace

    def again(self) -> Lease:
        """A lease for a copy of the layer: of the same workspace, or of another one if this is its layer's own.

        Raises:
            ConfigError: the buffer was destroyed, or there is no memory for another one.
        """
        held = self._held()
        held.buffer.require_usable()
        if self.kind != "own":
            return Lease(held)
        return lease(held.buffer.shape, held.max_tokens, held.buffer.device, "own")

    def release(self) -> None:
        """Give the workspace up, and its memory back if nobody else leases it; safe to call twice.

        Raises:
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing was given back.
        """
        held = self._workspace
        if held is None:
            return
        with _lock:
            last = held.kind != "given" and not any(other is not self for other in held.leases)
            if not last:
                held.leases.discard(self)
                self._workspace = self.held = None
                return
            if _named.get(self.name) is held:
                del _named[self.name]  # who comes now gets another one
        try:
            held.buffer.destroy()
        except CaptureError:
            with _lock:
                _named.setdefault(self.name, held)
            raise

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a layer's workspace is memory that its process knows by address, and cannot be sent; "
            "allowed: the layer's state_dict()"
        )


def lease(shape: MoEShape, max_tokens: int, device: torch.device, wanted: object = "shared") -> Lease:
    """A lease of the workspace that is wanted, which is made unless it is there.

    Args:
        shape: of the layer.
        max_tokens: of a launch; rounded up to a multiple of 128.
        device: where the weights are.
        wanted: "shared" for that of all layers with this shape, capacity and device; "own"; or a buffer.

    Raises:
        ConfigError: a value is not supported, the buffer does not fit, or the memory is not there (says the bytes).
        UnsupportedDeviceError: there is no GPU, or it is no Hopper GPU.
        CaptureError: the current stream is capturing a CUDA graph.
    """
    refuse_capture("a buffer cannot be made", "make it before the capture")
    check_int("max_tokens", max_tokens)
    if isinstance(wanted, SymmBuffer):
        return _lease_given(wanted, shape, max_tokens, device)
    known = isinstance(wanted, str) and wanted in ("shared", "own")
    check(known, "workspace", wanted, "'shared', 'own', or a SymmBuffer")
    bounded = max(0, min(max_tokens, MAX_TOKENS + 1))  # beyond them, making it says what is wrong
    name = _name_of(shape, -(-bounded // CAPACITY_STEP) * CAPACITY_STEP, device)
    if wanted == "own":
        return Lease(_made(f"{name}/own{next(_numbers)}", "own", shape, max_tokens, device))
    with _lock:
        found = _named.get(name)
        if found is None or not _is_usable(found.buffer):
            found = _made(name, "shared", shape, max_tokens, device)
        return Lease(found)


def _name_of(shape: MoEShape, capacity: int, device: torch.device) -> str:
    """The same in every process of this version: what was compiled for one layer serves its equals."""
    shared = f"/s{shape.shared}" if shape.shared else ""
    sizes = f"h{shape.hidden}/i{shape.intermediate}/e{shape.experts}/k{shape.topk}{shared}"
    return f"{LAYOUT}/{device}/{sizes}/t{capacity}"


def _made(name: str, kind: Kind, shape: MoEShape, max_tokens: int, device: torch.device) -> Workspace:
    sizes = (shape.experts, max_tokens, shape.topk, shape.hidden, shape.intermediate, shape.shared)
    made = Workspace(name, kind, get_symm_buffer_for_mega_moe(None, *sizes, device=device), max_tokens)
    _named[name] = made
    return made


def _lease_given(buffer: SymmBuffer, shape: MoEShape, max_tokens: int, device: torch.device) -> Lease:
    buffer.require_usable()
    capacity = buffer.num_max_tokens_per_rank
    fits = (buffer.shape, buffer.device, buffer.ranks) == (shape, device, 1)
    if not fits or not 0 < max_tokens <= capacity:
        given = (
            f"a buffer of {counted(buffer.ranks, 'rank')} on {buffer.device} for {capacity} tokens of {buffer.shape}"
        )
        tokens = f"{shown(max_tokens)} tokens or more of {shape}"
        raise ConfigError(f"workspace: {given}; allowed: one rank on {device}, {tokens}")
    with _lock:
        for known in list(_named.values()):
            if known.buffer is buffer:  # also of a layer that made it: then it is freed with the last of both
                return Lease(known)
        name = f"{_name_of(shape, capacity, device)}/given{next(_numbers)}"
        made = _named[name] = Workspace(name, "given", buffer, max_tokens)
        return Lease(made)


def _is_usable(buffer: SymmBuffer) -> bool:
    try:
        buffer.require_usable()
    except MegaMoeError:
        return False
    return True


def buffer_named(name: str) -> SymmBuffer:
    """The buffer of the workspace with this name.

    Raises:
        ConfigError: no layer of this process leases such a workspace any more, or ever did.
    """
    found = _named.get(name)
    if found is None:
        there = ", ".join(sorted(_named)) or "none, since there is no layer"
        raise ConfigError(
            f"workspace = {shown(name)} is of no layer in this process; allowed: {there}. What was compiled or "
            "exported with a layer needs it, or one of its shape, capacity and device, for as long as it is called"
        )
    return found.buffer
