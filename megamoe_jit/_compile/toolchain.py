"""Which NVRTC to compile with, and its exact identity.

Several NVRTCs may be installed at once (the wheel torch pulled in, another wheel, a system toolkit), and
the search of cuda-bindings takes the newest whatever the rest of the process uses. A cubin of CUDA 13
does not load on a driver of the 12.x generation, so the choice is made here, explicitly: the major
version of torch comes first. Choosing reads file names only; the library is loaded when something is
compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe_jit._compile.build_id import build_id
from megamoe_jit._compile.wheels import bindings_command, wheel_command
from megamoe_jit._errors import MegaMoeError, ToolchainError
from megamoe_jit._fork import renew_after_fork
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._version import __version__

ARCH = "sm_90a"
MINIMUM = (12, 8)  #: the oldest the kernels are compiled with
LOG = logging.getLogger("megamoe_jit")

_MAJORS = (13, 12)
_WHEEL_DIRS = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib")
_SYSTEM_DIRS = ("/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu")
_SONAME = re.compile(r"libnvrtc\.so\.(\d+)(?:\.(\d+))?")
_BUILTINS = re.compile(r"libnvrtc-builtins\.so\.(\d+)\.(\d+)$")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """One NVRTC.

    Attributes:
        path: the shared library.
        version: major and minor.
        build: its ELF build id, or the sha256 of the file where it has none.
    """

    path: Path
    version: tuple[int, int]
    build: str

    @property
    def release(self) -> str:
        """Its version as text, such as `12.9`."""
        return _dotted(self.version)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An NVRTC that could be used, for diagnosis.

    Attributes:
        path: the shared library.
        major: CUDA major version, zero if the file name does not tell.
        version: major and minor where the files beside it tell.
        origin: where it was found.
    """

    path: Path
    major: int
    version: tuple[int, int] | None
    origin: str


def wanted_major() -> tuple[int | None, str]:
    """The CUDA major version to compile with, and the reason; (None, reason) if any will do."""
    torch = sys.modules.get("torch")
    if torch is not None:
        text = getattr(getattr(torch, "version", None), "cuda", None)
        if text:
            return int(str(text).split(".")[0]), f"the imported torch is built for CUDA {text}"
    else:
        text = installed_torch_cuda()
        if text:
            return int(text.split(".")[0]), f"the installed torch is built for CUDA {text}"
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        version = metadata.version("cuda-bindings")
        return int(version.split(".")[0]), f"cuda-bindings is {version}"
    return None, "neither torch nor cuda-bindings says which"


def candidates() -> tuple[Candidate, ...]:
    """Every NVRTC found, best first; the first one is what `find_toolchain` takes."""
    explicit = get_settings().nvrtc
    if explicit is not None:
        return (_candidate(explicit, _chosen_by()),) if os.path.isfile(explicit) else ()
    wanted, _ = wanted_major()
    seen: dict[str, Candidate] = {}
    for path, origin in _search():
        seen.setdefault(os.path.realpath(path), _candidate(path, origin))
    return tuple(sorted(seen.values(), key=lambda c: wanted is not None and c.major != wanted))


def find_toolchain() -> Toolchain:
    """The NVRTC to compile with; decided once per process and explicit path.

    Raises:
        ToolchainError: none was found, or it is too old; says what to install.
    """
    with _find_lock:
        return _find_once(get_settings().nvrtc)


def current_builder() -> tuple[str, str] | None:
    """Package version and compiler build that would compile a kernel now; None without a compiler."""
    try:
        return __version__, find_toolchain().build
    except MegaMoeError:
        return None


def options_for(toolchain: Toolchain | None, extra_options: Sequence[str] = ()) -> tuple[str, ...]:
    """The compiler options; a part of the cache key, so they hold no path.

    Args:
        toolchain: decides which options exist; None for those that all have.
        extra_options: appended after those of the settings.
    """
    options = [
        f"--gpu-architecture={ARCH}",
        "-std=c++17",
        "-default-device",
        "-lineinfo",
        "--ptxas-options=-v",
        "--ptxas-options=--warn-on-spills",
    ]
    if toolchain is not None and toolchain.version >= (12, 9):
        options.append("--no-cache")  # its own cache would call the driver and swallow the ptxas log
    options.extend(f"--ptxas-options={option}" for option in get_settings().ptxas_options)
    return (*options, *extra_options)


def activate(toolchain: Toolchain) -> None:
    """Load the library into the process, so that cuda-bindings uses this one and no other.

    Raises:
        ToolchainError: it cannot be loaded, or another NVRTC is in the way.
    """
    with _activate_lock:
        _activate(toolchain.path)
        try:
            from cuda.bindings import nvrtc
        except ImportError as error:
            raise _no_bindings(error) from error

        status, major, minor = nvrtc.nvrtcVersion()
        if int(status) != 0 or (major, minor) != toolchain.version:
            raise ToolchainError(
                f"{toolchain.path} was taken for NVRTC {toolchain.release}, but calls reach {major}.{minor}"
            )


_activate_lock = threading.Lock()
_find_lock = threading.Lock()
renew_after_fork(globals(), "_activate_lock", "_find_lock")


@functools.lru_cache(maxsize=8)
def _find_once(explicit: Path | None) -> Toolchain:
    found = candidates()
    if not found and explicit is not None:
        what = "is not a file" if os.path.exists(explicit) else "does not exist"
        raise ToolchainError(f"NVRTC library {explicit} (from {_chosen_by()}) {what}. {_advice()}")
    if not found:
        raise ToolchainError(f"no NVRTC library (libnvrtc.so) was found. {_advice()}")
    chosen = found[0]
    wanted, reason = wanted_major()
    if explicit is None and wanted is not None and chosen.major != wanted:
        LOG.warning(
            "using NVRTC %s although %s; its kernels may not load. To get one that fits, run: %s",
            chosen.path,
            reason,
            wheel_command(wanted),
        )
    version = chosen.version or _loaded_version(chosen.path)
    if version < MINIMUM:
        raise ToolchainError(
            f"NVRTC {_dotted(version)} at {chosen.path} is too old; {_dotted(MINIMUM)} or newer is needed. {_advice()}"
        )
    try:
        build = build_id(chosen.path)
    except (OSError, ValueError) as error:
        raise ToolchainError(f"cannot read NVRTC library {chosen.path}: {error}") from error
    toolchain = Toolchain(chosen.path, version, build)
    LOG.debug("NVRTC %s, build %s, at %s (%s)", toolchain.release, build[:12], chosen.path, chosen.origin)
    return toolchain


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def correction() -> str:
    """What to do about an NVRTC that was named and does not do; empty if none was named."""
    settings = get_settings()
    if settings.nvrtc is None:
        return ""
    source = settings.source("nvrtc")
    if source.startswith("file "):
        return f"correct nvrtc in the settings {source}, or remove it there"
    return "pass another nvrtc, or none" if source == "argument" else "correct or unset MEGAMOE_JIT_NVRTC"


def _chosen_by() -> str:
    source = get_settings().source("nvrtc")
    return f"the settings {source}" if source.startswith("file ") else "MEGAMOE_JIT_NVRTC"


def _advice() -> str:
    major, reason = wanted_major()
    text = correction() or f"run: {wheel_command(major)} ({reason}), or set MEGAMOE_JIT_NVRTC to a libnvrtc.so"
    return text[0].upper() + text[1:]


def installed_torch_cuda() -> str | None:
    """`torch.version.cuda` of an installed torch, from its text, so that warmup need not import it."""
    from importlib import util

    with contextlib.suppress(ImportError, ValueError, OSError):
        spec = util.find_spec("torch")
        if spec is not None and spec.origin:
            text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
            match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
            return match[1] if match else None
    return None


def _search() -> Iterator[tuple[Path, str]]:
    """Libraries in the order of preference among equals: already loaded, wheels, environment, system."""
    yield from _loaded()
    places: list[tuple[str, str]] = [
        (os.path.join(base or ".", sub), "wheel") for base in sys.path for sub in _WHEEL_DIRS
    ]
    for variable, sub in (("CONDA_PREFIX", "lib"), ("CUDA_HOME", "lib64"), ("CUDA_PATH", "lib64")):
        if os.environ.get(variable):
            places.append((os.path.join(os.environ[variable], sub), variable))
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder:
            places.append((folder, "LD_LIBRARY_PATH"))
    places.append(("/usr/local/cuda/lib64", "system"))
    places.extend((str(p), "system") for p in sorted(Path("/usr/local").glob("cuda-*/lib64"), reverse=True))
    places.extend((folder, "system") for folder in _SYSTEM_DIRS)
    for folder, origin in places:
        for major in _MAJORS:
            path = Path(folder) / f"libnvrtc.so.{major}"
            if os.path.isfile(path):
                yield path.absolute(), origin


def _loaded() -> Iterator[tuple[Path, str]]:
    """NVRTCs that are mapped into this process already."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    for line in maps.splitlines():
        parts = line.split(None, 5)
        if len(parts) == 6 and _SONAME.match(os.path.basename(parts[5])) and os.path.isfile(parts[5]):
            yield Path(parts[5]), "loaded in this process"


def _candidate(path: Path, origin: str) -> Candidate:
    """Read the version from the file name or, since that of a wheel is short, from the builtins beside it."""
    real = Path(os.path.realpath(path))
    name = _SONAME.match(real.name) or _SONAME.match(path.name)
    version: tuple[int, int] | None = None
    if name and name[2]:
        version = int(name[1]), int(name[2])
    else:
        beside = [_BUILTINS.match(p.name) for p in real.parent.glob("libnvrtc-builtins.so.*")]
        pairs = {(int(m[1]), int(m[2])) for m in beside if m and (not name or m[1] == name[1])}
        version = pairs.pop() if len(pairs) == 1 else None
    major = int(name[1]) if name else version[0] if version else 0
    return Candidate(path, major, version, origin)


def _no_bindings(error: ImportError) -> ToolchainError:
    step = bindings_command(wanted_major()[0])
    return ToolchainError(f"cuda-python is not installed: {error}. Run: {step}")


def _activate(path: Path) -> None:
    """Preload the library and its builtins, looked up by name alone; then see what cuda-bindings takes."""
    try:
        for builtins in sorted(path.resolve().parent.glob("libnvrtc-builtins.so.*")):
            if _BUILTINS.match(builtins.name):
                ctypes.CDLL(str(builtins), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ToolchainError(f"cannot load NVRTC library {path}: {error}. {_advice()}") from error
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        used = load_nvidia_dynamic_lib("nvrtc").abs_path
    except ImportError as error:
        raise _no_bindings(error) from error
    except RuntimeError as error:
        raise ToolchainError(f"cuda-bindings cannot use NVRTC library {path}: {error}") from error
    if used is not None and not os.path.samefile(used, path):
        raise ToolchainError(
            f"NVRTC {path} was chosen, but this process uses {used} already; "
            f"set MEGAMOE_JIT_NVRTC={used}, or load nothing that brings another NVRTC"
        )


def _loaded_version(path: Path) -> tuple[int, int]:
    """Ask the library itself."""
    try:
        library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        status = library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    except (OSError, AttributeError) as error:
        raise ToolchainError(f"{path} is not a usable NVRTC library: {error}") from error
    if status != 0:
        raise ToolchainError(f"{path} does not tell its version (nvrtcVersion returned {status})")
    return major.value, minor.value
