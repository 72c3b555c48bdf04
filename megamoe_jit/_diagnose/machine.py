"""What this machine offers, as plain data: packages, compilers, driver and GPUs, file systems, tools.

Nothing here needs torch or a GPU, and nothing raises because something is missing: the answer says so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megamoe_jit._device.driver import Gpu, gpus
from megamoe_jit._documents import Count, Document, Says
from megamoe_jit._errors import ToolchainError
from megamoe_jit._version import __version__

if TYPE_CHECKING:
    from megamoe_jit._settings.read import Fault

PACKAGES = (
    "torch",
    "numpy",
    "cuda-python",
    "cuda-bindings",
    "cuda-pathfinder",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-nvrtc",
    "jinja2",
    "platformdirs",
    "click",
    "rich",
)

TOOLS = ("nvdisasm", "cuobjdump")  #: disassemblers that `inspect --sass` can use, the preferred one first
GET_A_TOOL = "pip install nvidia-cuda-nvdisasm"

_NETWORK = re.compile(
    r"nfs|cifs|smb|9p|afs|lustre|gpfs|beegfs|ceph|gluster|sshfs|orangefs|pvfs|panfs|weka|s3fs|gcsfuse|juicefs"
)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Where a path lies.

    Attributes:
        mount: mount point, empty if unknown.
        type: `ext4`, `nfs4`, ... or `unknown`.
        network: whether other machines see it too, as far as the type tells.
        free_bytes: what this user may still write, None if unknown.
    """

    mount: str
    type: str
    network: bool
    free_bytes: int | None


def installed(package: str) -> str | None:
    """The version of a package, without importing it; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class FoundCompiler:
    """An NVRTC that was found.

    Attributes:
        version: null if its file does not say more than the major one
        origin: how it was found
    """

    path: str
    version: str | None
    major: Count
    origin: str


@dataclass(frozen=True, slots=True)
class ChosenCompiler:
    """The NVRTC that is used.

    Attributes:
        build: digest of its files
    """

    path: str
    version: str
    build: str


@dataclass(frozen=True, slots=True)
class Compilers:
    """Every NVRTC found, and the one that is used, or why none is."""

    chosen: ChosenCompiler | None
    problem: str | None
    candidates: tuple[FoundCompiler, ...]


def compilers() -> Compilers:
    """Every NVRTC found, and the one that is used, or why none is."""
    from megamoe_jit._compile.toolchain import candidates, find_toolchain

    def text(version: Sequence[int]) -> str:
        return ".".join(map(str, version))

    found = tuple(
        FoundCompiler(str(c.path), text(c.version) if c.version else None, c.major, c.origin) for c in candidates()
    )
    try:
        chosen = find_toolchain()
    except ToolchainError as error:
        return Compilers(None, str(error), found)
    return Compilers(ChosenCompiler(str(chosen.path), text(chosen.version), chosen.build), None, found)


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver and its GPUs.

    Attributes:
        driver_cuda: newest CUDA version that it supports
        problem: why there is none
        code: what the driver answered instead of success
        gpus: those that this process may use
    """

    driver_cuda: str | None
    problem: str | None
    code: int | None
    gpus: tuple[Gpu, ...]


def file_system(path: Path) -> FileSystem:
    """The file system of a path, or of the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    mount, kind = _mount_of(os.path.realpath(path))
    try:
        status = os.statvfs(path)
        free: int | None = status.f_bavail * status.f_frsize
    except OSError:
        free = None
    return FileSystem(mount, kind, bool(_NETWORK.search(kind)), free)


def _mount_of(path: str) -> tuple[str, str]:
    """Mount point and type, from the last of the longest matching mounts, which hides the earlier ones."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return best, kind
    for line in lines:
        left, _, right = line.partition(" - ")
        parts = left.split()
        if len(parts) < 5 or not right:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), parts[4])
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return best, kind


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool: from an installed wheel, conda or toolkit, else from PATH."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        return shutil.which(name)
    try:
        found = find_nvidia_binary_utility(name)
    except Exception:  # an older cuda-pathfinder knows fewer tools and raises errors of its own for the others
        found = None
    return found or shutil.which(name)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of this package.

    Attributes:
        name: its environment variable
        source: default, environment, argument, or file PATH
        problem: what is not allowed, and what is; the value is as it was written then
    """

    name: str
    value: Annotated[Any, Says(type=["string", "number", "boolean", "array", "null"])]
    source: str
    problem: str | None
    default: str
    meaning: str


def settings_table(faults: Sequence[Fault] = ()) -> tuple[Setting, ...]:
    """Every setting: its variable, value, where the value comes from, what is wrong with it, default and meaning.

    Args:
        faults: from `lenient`; of what is wrong, the value is what was written.
    """
    from megamoe_jit._settings.settings import get_settings
    from megamoe_jit._settings.variables import VARIABLES

    values = get_settings()
    rows = []
    for variable in VARIABLES:
        value, source = getattr(values, variable.field), values.source(variable.field)
        wrong = [fault for fault in faults if fault.field == variable.field]
        if wrong and (source == "default" or wrong[0].source == "environment"):
            value, source = wrong[0].value, wrong[0].source
        problem = "; ".join(fault.message for fault in wrong) or None
        rows.append(Setting(variable.name, _plain(value), source, problem, variable.default, variable.meaning))
    return tuple(rows)


def _plain(value: Any) -> Any:
    """A value as JSON can have it; what a file says may be anything that TOML knows."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


@dataclass(frozen=True, slots=True)
class Environment(Document):
    """Versions, compilers, GPUs and settings."""

    KIND = "env"

    version: str
    python: str
    platform: str
    packages: dict[str, str | None]
    nvrtc: Compilers
    driver: Driver
    settings: tuple[Setting, ...]


def examine_environment(faults: Sequence[Fault]) -> Environment:
    """All of it, as it is now.

    Args:
        faults: from `lenient`, in which this is to be called.
    """
    import platform

    machine = gpus()
    return Environment(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: installed(name) for name in PACKAGES},
        nvrtc=compilers(),
        driver=Driver(machine.driver_cuda, machine.problem, machine.code, machine.gpus),
        settings=settings_table(faults),
    )
