"""Symmetric memory: which processes can share it, and getting it.

torch lets processes share memory that pass each other its handles through sockets in the temporary directory, named
after their process numbers.  So ranks may be in containers of their own, if these are on one host (which its boot id
tells, not its name) and have that directory in common.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe_jit._device.nvml import peer_access
from megamoe_jit._errors import MegaMoeError
from megamoe_jit._layer.group import by_rank, collectively, gather, group_rank
from megamoe_jit._text import first_line

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  #: in the order in which torch looks at them
_SOCKET_NAME_BYTES = 107  #: longest name of a socket; torch copies a longer one past the end of its buffer
_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    host: str  #: boot id of its kernel, the host's name where that cannot be read
    host_name: str
    process: int  #: its number, in its own PID namespace
    directory: str  #: in which torch makes its socket
    directory_id: tuple[int, int] | None  #: which one that is on this host: file system and inode
    gpu: str  #: UUID
    index: int  #: of that GPU among those the process sees


def host_id() -> str:
    """The boot id of this host, its name where that cannot be read."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip() or socket.gethostname()
    except (OSError, ValueError):
        return socket.gethostname()


def _here(device: torch.device) -> Place:
    name, host = socket.gethostname(), host_id()
    directory = next((os.environ[key] for key in _TEMPORARY if key in os.environ), "/tmp")
    try:
        found = os.stat(directory)
        directory_id = found.st_dev, found.st_ino
    except OSError:
        directory_id = None
    return Place(host, name, os.getpid(), directory, directory_id, _uuid(device), int(device.index or 0))


def _uuid(device: torch.device | int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


def _refuse_places(places: Sequence[Place]) -> None:
    """Raise unless these ranks can share memory, as far as that shows without looking at their GPUs."""
    if len({place.host for place in places}) > 1:
        hosts = by_rank(f"{place.host_name} (boot id {place.host})" for place in places)
        raise MegaMoeError(f"ranks are on different hosts ({hosts}); allowed: GPUs of one host")
    if len({place.gpu for place in places}) < len(places):
        raise MegaMoeError(
            f"ranks share a GPU ({by_rank(place.gpu for place in places)}); allowed: one GPU for each rank"
        )
    if len({place.directory_id for place in places}) > 1:
        raise MegaMoeError(
            f"ranks have different temporary directories ({by_rank(place.directory for place in places)}), and torch "
            "shares memory through sockets in it; allowed: one directory for all (TMPDIR), which containers all mount"
        )
    if len({place.process for place in places}) < len(places):
        raise MegaMoeError(
            f"ranks in different PID namespaces have one process number ({by_rank(p.process for p in places)}), after "
            "which torch names its sockets; allowed: containers that share the PID namespace of the host"
        )
    for place in places:
        name = f"{place.directory}/symm_mem-{place.process}"
        if len(os.fsencode(name)) > _SOCKET_NAME_BYTES:
            raise MegaMoeError(
                f"torch shares memory through a socket, whose name {name} is too long; allowed: {_SOCKET_NAME_BYTES} "
                "bytes (set TMPDIR to a shorter path on all ranks)"
            )


def _reaches(device: torch.device, uuid: str) -> bool | None:
    """Whether the device may read and write the memory of a GPU of this host; None if that cannot be told."""
    for index in range(torch.cuda.device_count()):
        if _uuid(index) == uuid:
            return bool(torch.cuda.can_device_access_peer(device, index))
    return peer_access(_uuid(device), uuid)


def _check_peers(group: Any, device: torch.device) -> tuple[list[Place], list[int]]:
    """Raise unless all ranks can share memory; their places, and the ranks of whose GPUs that cannot be told."""
    places = gather(group, _here(device))
    _refuse_places(places)
    others = [rank for rank in range(len(places)) if rank != group_rank(group)]
    access = {rank: _reaches(device, places[rank].gpu) for rank in others}
    apart = [rank for rank, reached in access.items() if reached is False]
    if apart:
        gpus = ", ".join(f"rank {rank}: {places[rank].gpu}" for rank in apart)
        raise MegaMoeError(
            f"{device} ({places[group_rank(group)].gpu}) has no access to the memory of other ranks' GPUs ({gpus}); "
            "allowed: GPUs that are each other's peers over NVLink (`nvidia-smi topo -p2p rw` shows them)"
        )
    return places, [rank for rank, reached in access.items() if reached is None]


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """A variable of the environment inside, for what reads it there alone; as it was, behind."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def allocate_symmetric(
    group: Any, size: int, device: torch.device, refusal: Callable[[str], MegaMoeError]
) -> tuple[torch.Tensor, Any]:
    """Symmetric memory of `size` bytes on every rank, and its handle (`buffer_ptrs` by rank).

    NVLink multicast is not used. `refusal` makes the error of a rank that has no memory.

    Raises:
        MegaMoeError: the ranks are not NVLink peers of one host, or the allocation failed; on every rank.
    """
    import torch.distributed._symmetric_memory as symm_mem

    places, unknown = collectively(group, "checking the peers", lambda: _check_peers(group, device))

    def allocate() -> torch.Tensor:
        try:
            return symm_mem.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise refusal(first_line(error)) from None

    def share() -> Any:
        try:
            # ranks that see one GPU each: to torch all of these are GPU 0, and so one, until a variable says otherwise,
            # which it reads at each rendezvous; these GPUs are known to be different
            equal = len({place.index for place in places}) < len(places)
            with variable_set(_OVERLAPPING, "1") if equal else nullcontext():
                return symm_mem.rendezvous(memory, group=group)
        except RuntimeError as error:
            hint = (
                f"; {device} may have no access to the GPUs of ranks {unknown}, which this process cannot see: "
                "`nvidia-smi topo -p2p rw` on the host shows it"
            )
            why = f"torch could not share the memory of {device}: {first_line(error)}"
            raise MegaMoeError(why + (hint if unknown else "")) from error

    # in two steps: a rendezvous waits for all ranks, and one that has no memory would never come
    memory = collectively(group, f"allocating {size} bytes of symmetric memory", allocate)
    return memory, collectively(group, "sharing symmetric memory", share)
