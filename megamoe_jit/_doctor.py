"""Will it work here, and if not, what to do: one check per thing that has to fit.

A check never raises and never needs a GPU; each says what it found and, unless all is well, the next step.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe_jit._errors import ConfigError, MegaMoeError
from megamoe_jit._machine import (
    TOOLS,
    FileSystem,
    Machine,
    compilers,
    file_system,
    find_tool,
    gpus,
    tool_command,
)
from megamoe_jit._text import human_bytes

if TYPE_CHECKING:
    from megamoe_jit._cache import KernelCache

__all__ = ["Check", "Status", "examine", "worst"]

LOW_SPACE = 256 << 20  #: free bytes below which a cache gets a warning
_TRIAL = 'extern "C" __global__ void megamoe_trial(int* out) { out[threadIdx.x] = threadIdx.x; }\n'


class Status(StrEnum):
    """What a check found, from good to bad."""

    OK = "ok"
    WARN = "warn"  #: works, but not everything or not well
    FAIL = "fail"  #: kernels cannot be compiled or run here


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at.
        status: what came of it.
        detail: what was found.
        next_step: what to do, empty if nothing.
        data: the facts behind it.
    """

    name: str
    status: Status
    detail: str
    next_step: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "status": self.status.value, "next_step": self.next_step or None}


def worst(checks: list[Check]) -> Status:
    """The worst status of all."""
    order = list(Status)
    return max((check.status for check in checks), key=order.index, default=Status.OK)


def examine(trial: bool = True) -> Iterator[Check]:
    """Run every check in turn.

    Args:
        trial: whether to compile a small kernel as well.
    """
    settings = _guarded("settings", _settings)
    yield settings
    if settings.status is Status.FAIL:
        return  # nothing below can be asked without them
    found = compilers()
    machine = gpus()
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("compiler", lambda: _compiler(found)),
        ("torch", lambda: _torch(machine)),
        ("driver", lambda: _driver(machine, found)),
        ("gpu", lambda: _gpu(machine)),
        ("cache", _cache),
        ("read-only", _read_only),
        ("locks", _locks),
        ("tools", _tools),
    ]
    if trial:
        steps.append(("trial compile", lambda: _trial(found)))
    for name, step in steps:
        yield _guarded(name, step)


def _guarded(name: str, step: Callable[[], Check]) -> Check:
    try:
        return step()
    except Exception as error:  # a diagnosis must survive what it looks for
        return Check(name, Status.FAIL, f"{type(error).__name__}: {error}", "report this with `env --json`")


def _settings() -> Check:
    from megamoe_jit import _settings as module

    try:
        module.get_settings()
    except ConfigError as error:
        return Check("settings", Status.FAIL, str(error), "correct or unset it")
    known = {variable.name for variable in module.VARIABLES}
    chosen = sorted(name for name in known if os.environ.get(name, "").strip())
    unknown = sorted(name for name in os.environ if name.startswith(module.PREFIX) and name not in known)
    data = {"set": chosen, "unknown": unknown}
    if unknown:
        step = "unset or correct them; `megamoe-jit env` lists every variable"
        return Check("settings", Status.WARN, f"unknown variables are ignored: {', '.join(unknown)}", step, data)
    return Check("settings", Status.OK, ", ".join(chosen) + " set" if chosen else "all defaults", "", data)


def _compiler(found: dict[str, Any]) -> Check:
    from megamoe_jit._toolchain import correction, wanted_major
    from megamoe_jit._wheels import wheel_command

    chosen, others = found["chosen"], found["candidates"]
    if chosen is None:
        step = correction() or "install NVRTC as the message says"
        return Check("compiler", Status.FAIL, found["problem"], step, found)
    wanted, reason = wanted_major()
    text = f"NVRTC {chosen['version']} at {chosen['path']}"
    if len(others) > 1:
        text += f" ({len(others)} found)"
    if wanted is not None and int(chosen["version"].split(".")[0]) != wanted:
        step = correction() or f"{wheel_command(wanted)}, or set MEGAMOE_JIT_NVRTC"
        return Check("compiler", Status.WARN, f"{text}, but {reason}", step, found)
    return Check("compiler", Status.OK, f"{text}; {reason}", "", found)


def _torch(machine: Machine) -> Check:
    from importlib.metadata import PackageNotFoundError, version

    from megamoe_jit._toolchain import _installed_torch_cuda

    try:
        release = version("torch")
    except PackageNotFoundError:
        return Check("torch", Status.FAIL, "not installed", "pip install torch", {"version": None, "cuda": None})
    cuda = _installed_torch_cuda()
    data = {"version": release, "cuda": cuda}
    if cuda is not None:
        return Check("torch", Status.OK, f"{release}, built for CUDA {cuda}", "", data)
    if machine.gpus:
        step = "install a CUDA build of torch: https://pytorch.org/get-started/locally/"
        return Check("torch", Status.FAIL, f"{release} has no CUDA, and this machine has a GPU", step, data)
    return Check("torch", Status.OK, f"{release}, without CUDA (enough to compile; there is no GPU here)", "", data)


def _driver(machine: Machine, found: dict[str, Any]) -> Check:
    from megamoe_jit._toolchain import MINIMUM
    from megamoe_jit._wheels import wheel_command

    data = {"driver_cuda": machine.driver_cuda, "nvrtc": (found["chosen"] or {}).get("version")}
    if machine.driver_cuda is None:
        step = "to compile kernels, none is needed; to run them, install one, or run the container with GPUs"
        return Check("driver", Status.WARN, "no NVIDIA driver", step, {**data, "problem": machine.problem})
    text = f"supports CUDA {machine.driver_cuda}"
    driver, compiler = int(machine.driver_cuda.split(".")[0]), int((data["nvrtc"] or "0").split(".")[0])
    if compiler > driver:
        step = "update the driver"
        if driver >= MINIMUM[0]:
            step = f"{wheel_command(driver)} with a torch for CUDA {driver}, or {step}"
        return Check("driver", Status.FAIL, f"{text}: too old for kernels of NVRTC {data['nvrtc']}", step, data)
    return Check("driver", Status.OK, text, "", data)


def _gpu(machine: Machine) -> Check:
    data = {"gpus": [asdict(gpu) for gpu in machine.gpus]}
    names = ", ".join(f"{gpu.name} (SM {gpu.compute_capability}, {gpu.sms} SMs)" for gpu in machine.gpus)
    if not machine.gpus:
        step = "run on a machine with an H100 or H200; kernels compiled here can be taken there (`cache export`)"
        return Check("gpu", Status.WARN, "none: kernels can be compiled here, but not run", step, data)
    if not any(gpu.supported for gpu in machine.gpus):
        step = "use a GPU of compute capability 9.0 (H100, H200, H20)"
        return Check("gpu", Status.FAIL, f"no Hopper GPU: {names}", step, data)
    if not all(gpu.supported for gpu in machine.gpus):
        step = "choose the Hopper ones with CUDA_VISIBLE_DEVICES"
        return Check("gpu", Status.WARN, f"not all are Hopper: {names}", step, data)
    return Check("gpu", Status.OK, names, "", data)


def _owner(status: os.stat_result) -> str:
    import pwd

    try:
        return pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        return str(status.st_uid)


def _where(system: FileSystem) -> str:
    free = "" if system.free_bytes is None else f", {human_bytes(system.free_bytes)} free"
    return f"{system.type}{free}"


def _can_write(folder: Path) -> bool:
    """Tried, not asked for: permissions say little about read-only, full and foreign file systems."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".megamoe-jit-doctor-", dir=folder))
    except OSError:
        return False
    return True


def _cache() -> Check:
    from megamoe_jit._locks import check_private
    from megamoe_jit._settings import get_settings

    root = get_settings().cache_dir
    path = next(path for path in (root, *root.parents) if os.path.exists(path))  # that this user may see
    system, status = file_system(path), path.stat()
    data: dict[str, Any] = {"path": str(root), "exists": path == root, **asdict(system)}
    data["owner"], data["mode"] = _owner(status), f"{stat.S_IMODE(status.st_mode):04o}"
    text = f"{root}, {_where(system)}"
    elsewhere = "set MEGAMOE_JIT_CACHE_DIR to a folder of your own"
    if path == root:
        text += f", {data['owner']} {data['mode']}"
        try:
            check_private(Path(os.path.realpath(root)))
        except OSError as error:
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            step = f"chmod go-w {root}, or {elsewhere}" if ours else elsewhere
            return Check("cache", Status.WARN, f"{text}: {error}", step, data)
    else:
        text += ", not there yet"
    if not _can_write(path):
        detail = f"{text}: cannot be written; kernels are compiled again in every process"
        return Check("cache", Status.WARN, detail, elsewhere, data)
    if system.network:
        step = "works; a local folder is faster: set MEGAMOE_JIT_CACHE_DIR"
        return Check("cache", Status.WARN, f"{text}: a network file system", step, data)
    if system.free_bytes is not None and system.free_bytes < LOW_SPACE:
        return Check("cache", Status.WARN, f"{text}: little space", f"make room, or {elsewhere}", data)
    return Check("cache", Status.OK, text, "", data)


def _read_only() -> Check:
    from megamoe_jit._cache import readonly_caches

    caches = {}
    for cache in readonly_caches():
        problem = _unusable(cache)
        caches[str(cache.root)] = problem, 0 if problem else len(cache.entries())
    if not caches:
        return Check("read-only", Status.OK, "no read-only caches set")
    data = {"caches": [{"path": path, "problem": p or None, "entries": n} for path, (p, n) in caches.items()]}
    text = "; ".join(f"{path}: {problem or f'kernels: {count}'}" for path, (problem, count) in caches.items())
    if any(problem or not count for problem, count in caches.values()):
        step = "correct MEGAMOE_JIT_READONLY_CACHE; `megamoe-jit cache import FILE --cache-dir DIR` fills such a folder"
        return Check("read-only", Status.WARN, text, step, data)
    return Check("read-only", Status.OK, text, "", data)


def _unusable(cache: KernelCache) -> str:
    """Why nothing is read from a read-only cache; empty if something may be."""
    from megamoe_jit._locks import check_private

    try:
        os.stat(cache.root)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return str(error)
    try:
        check_private(cache.path, cache.forbidden)
        os.listdir(cache.path)
    except FileNotFoundError:
        return f"holds no {cache.path.name}"
    except OSError as error:
        return str(error)
    return ""


def _locks() -> Check:
    from megamoe_jit._locks import key_lock, lock_dir

    step = "set MEGAMOE_JIT_LOCK_DIR to a local folder of your own; until then processes may compile the same kernel"
    try:
        folder = lock_dir()
    except OSError as error:
        return Check("locks", Status.WARN, f"no folder for lock files: {error}", step)
    system = file_system(folder)
    data = {"path": str(folder), **asdict(system)}
    text = f"{folder}, {system.type}"
    with key_lock(f"doctor-{os.getpid()}", "a trial lock") as held:
        if not held:
            return Check("locks", Status.WARN, f"{text}: cannot lock", step, data)
    (folder / f"doctor-{os.getpid()}.lock").unlink(missing_ok=True)
    if system.network:
        return Check("locks", Status.WARN, f"{text}: a network file system, where locks may hang", step, data)
    return Check("locks", Status.OK, text, "", data)


def _tools() -> Check:
    found = {name: find_tool(name) for name in TOOLS}
    present = [path for path in found.values() if path]
    if present:
        return Check("tools", Status.OK, ", ".join(present), "", found)
    detail = f"neither {' nor '.join(TOOLS)}; only `inspect --sass` needs one"
    return Check("tools", Status.OK, detail, tool_command("nvdisasm"), found)


def _trial(found: dict[str, Any]) -> Check:
    from megamoe_jit._compiler import compile_source
    from megamoe_jit._toolchain import find_toolchain

    if found["chosen"] is None:
        return Check("trial compile", Status.FAIL, "not possible without a compiler", "see compiler above")
    begin = time.perf_counter()
    try:
        result = compile_source(_TRIAL, entry="megamoe_trial", toolchain=find_toolchain())
    except MegaMoeError as error:
        step = "see compiler above, or choose another with MEGAMOE_JIT_NVRTC"
        return Check("trial compile", Status.FAIL, str(error), step)
    seconds = time.perf_counter() - begin
    data = {"seconds": seconds, "cubin_bytes": len(result.cubin), "python": sys.version.split()[0]}
    return Check("trial compile", Status.OK, f"{len(result.cubin)} bytes of sm_90a code in {seconds:.2f} s", "", data)
