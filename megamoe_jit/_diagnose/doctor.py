"""Will it work here, and if not, what to do: one check per thing that has to fit.

A check never raises and never needs a GPU; each says what it found and, unless all is well, the next step.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe_jit._device.driver import gpus
from megamoe_jit._diagnose.doctor_machine import (
    check_compiler,
    check_driver,
    check_gpu,
    check_ready_kernels,
    check_sources,
    check_torch,
    check_trial,
    compiling_forbidden,
)
from megamoe_jit._diagnose.engines import examine_engine, probe_of
from megamoe_jit._diagnose.finding import Check, Status
from megamoe_jit._diagnose.machine import GET_A_TOOL, TOOLS, FileSystem, compilers, file_system, find_tool
from megamoe_jit._settings.read import listed
from megamoe_jit._settings.settings import get_settings, lenient
from megamoe_jit._settings.variables import PREFIX, VARIABLES, default_config_file
from megamoe_jit._text import human_bytes, several

if TYPE_CHECKING:
    from megamoe_jit._cache.cache import KernelCache

LOW_SPACE = 256 << 20  #: free bytes below which a cache gets a warning


def examine(trial: bool = True, engine: str | None = None) -> Iterator[Check]:
    """Run every check in turn.

    That of the kernel sources is left out where the packaged ones are used and are whole, that of the ready kernels
    where kernels may be compiled.

    Args:
        trial: whether to compile a small kernel as well.
        engine: one of `ENGINES` that is looked at last.
    """
    settings = _guarded("settings", _settings)
    yield settings
    if settings.status is Status.FAIL:
        return  # nothing below can be asked without them
    sources = _guarded("sources", check_sources)
    if get_settings().kernels_src is not None or sources.status is not Status.OK:
        yield sources
    found = compilers()
    machine = gpus()
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("compiler", lambda: check_compiler(found)),
        ("torch", lambda: check_torch(machine)),
        ("driver", lambda: check_driver(machine, found)),
        ("gpu", lambda: check_gpu(machine)),
        ("cache", _cache),
        ("read-only", _read_only),
        ("locks", _locks),
        ("tools", _tools),
    ]
    if get_settings().disable_jit:
        steps.append(("kernels", lambda: check_ready_kernels(machine)))
    if trial:
        steps.append(("trial compile", lambda: check_trial(found)))
    for name, step in steps:
        yield _guarded(name, step)
    if engine is not None:
        yield from examine_engine(probe_of(engine))


def _guarded(name: str, step: Callable[[], Check]) -> Check:
    try:
        return step()
    except Exception as error:  # a diagnosis must survive what it looks for
        return Check(name, Status.FAIL, f"{type(error).__name__}: {error}", "report this with `env --json`", {})


def _settings() -> Check:
    with lenient() as faults:
        settings = get_settings()
    if faults:
        variables = [fault.field for fault in faults if fault.message.startswith(PREFIX)]
        steps = [f"correct or unset {', '.join(PREFIX + field.upper() for field in variables)}"] if variables else []
        if len(variables) < len(faults):
            named = settings.config is not None
            steps.append(f"correct that file{f', or correct or unset {PREFIX}CONFIG' if named else ''}")
        detail = "\n".join(fault.message for fault in faults)
        return Check(
            "settings", Status.FAIL, detail, "; ".join(steps), {"problems": [fault._asdict() for fault in faults]}
        )
    file = settings.config or default_config_file()
    known = {variable.name for variable in VARIABLES}
    chosen = sorted(name for name in known if os.environ.get(name, "").strip())
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    written = sorted(field for field, source in settings.sources.items() if source.startswith("file "))
    data: dict[str, Any] = {"set": chosen, "unknown": [*unknown, *sorted(settings.unknown)]}
    data |= {
        "ignored": dict(settings.ignored),
        "file": str(file) if os.path.isfile(file) else None,
        "from_file": written,
    }
    if unknown or settings.ignored:
        texts, steps = [], []
        if unknown:
            texts.append(f"unknown variables are ignored: {several(unknown)}")
            steps.append("unset or correct them; `megamoe-jit env` lists every variable")
        if settings.ignored:
            texts.append(f"ignored in {file}: {listed(settings.ignored)}")
            steps.append(f"correct {file}; a key is the name of a variable in lower case, without {PREFIX}")
        return Check("settings", Status.WARN, "\n".join(texts), "; ".join(steps), data)
    texts = [f"{', '.join(chosen)} set"] if chosen else []
    texts += [f"{', '.join(written)} from {file}"] if written else []
    return Check("settings", Status.OK, "; ".join(texts) or "all defaults", None, data)


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
        trial = tempfile.mkdtemp(prefix=".megamoe-jit-doctor-", dir=folder)
    except OSError:
        return False
    with contextlib.suppress(OSError):  # it can be written, whatever becomes of the trial
        os.rmdir(trial)
    return True


def _why_not_read(folder: Path, forbidden: int) -> str:
    """Why nothing is taken from a folder that is there; empty if something is.

    Raises:
        FileNotFoundError: there is none.
    """
    from megamoe_jit._trust import check_private

    try:
        check_private(folder, forbidden)
        os.stat(f"{folder}/.")  # whether it can be entered
        os.listdir(folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        return f"{folder}: {error.strerror}" if error.errno else str(error)
    return ""


def _faults(cache: KernelCache, writing: bool) -> dict[Path, str]:
    """The folders of a cache that stand in its way, with the reason, those above first.

    Args:
        cache: of the user; its root is there.
        writing: whether it must be possible to add kernels.
    """
    root, faults = Path(os.path.realpath(cache.root)), dict[Path, str]()
    groups = list[Path]()
    with contextlib.suppress(OSError):
        groups = sorted(Path(entry.path) for entry in os.scandir(cache.path) if len(entry.name) == 2)
    for folder in (root, cache.path, cache.path / ".tmp", cache.path / "quarantine", *groups):
        try:
            problem = _why_not_read(folder, cache.forbidden)
        except FileNotFoundError:
            continue  # it is made when it is needed
        must_write = writing and (folder != root or not os.path.lexists(cache.path))
        if not problem and must_write and not (os.access(folder, os.W_OK) if folder in groups else _can_write(folder)):
            problem = f"{folder} cannot be written; kernels are compiled again in every process"
        if problem:
            faults[folder] = problem
        if folder in (root, cache.path) and not os.access(folder, os.R_OK | os.X_OK):
            break  # what is below cannot be told
    return faults


def mending(folders: list[Path], root: Path) -> str:
    """The command that gives these folders of a cache the permissions they need; empty if none would help."""
    for folder in folders:
        status = os.lstat(folder)
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or (status.st_mode & 0o722) == 0o700:
            return ""
    if len(folders) == 1:
        return f"chmod u+rwx,go-w {shlex.quote(str(folders[0]))}"
    return f"chmod -R u+rwX,go-w {shlex.quote(str(root))}"


def _dead_link(path: Path) -> Path | None:
    """The link on the way to a folder that leads to nothing; None if there is none."""
    for place in (path, *path.parents):
        if os.path.islink(place):
            try:
                os.stat(place)
            except PermissionError:  # it leads somewhere that this user may not see
                continue
            except OSError:
                return place
    return None


def _cache() -> Check:
    from megamoe_jit._cache.cache import user_cache

    settings = get_settings()
    root, sealed = settings.cache_dir, settings.disable_jit
    path = next(path for path in (root, *root.parents) if os.path.exists(path))  # that this user may see
    system, status = file_system(path), path.stat()
    data: dict[str, Any] = {"path": str(root), "exists": path == root, **asdict(system)}
    data["owner"], data["mode"] = _owner(status), f"{stat.S_IMODE(status.st_mode):04o}"
    text = f"{root}, {_where(system)}"
    if settings.no_cache:
        return Check("cache", Status.OK, f"{text}: not used, by {settings.place('no_cache')}", None, data)
    elsewhere = f"set {settings.place('cache_dir')} to a folder of your own"
    link = _dead_link(root)
    if link is not None:
        step = f"make the folder {os.path.realpath(link)}, remove the link, or {elsewhere}"
        return Check("cache", Status.WARN, f"{text}: {link} is a link to nothing", step, data)
    if path == root:
        text += f", {data['owner']} {data['mode']}"
        faults = _faults(user_cache(), writing=not sealed)
        if faults:
            data["faults"] = {str(folder): problem for folder, problem in faults.items()}
            mended_by = mending(list(faults), root)
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            detail = f"{text}: {next(iter(faults.values()))}{more}"
            return Check("cache", Status.WARN, detail, f"{mended_by}, or {elsewhere}" if mended_by else elsewhere, data)
    else:
        text += ", not there yet"
        if not sealed and not _can_write(path):
            detail = f"{text}: cannot be written; kernels are compiled again in every process"
            return Check("cache", Status.WARN, detail, elsewhere, data)
    if sealed:
        return Check("cache", Status.OK, f"{text}; only read, by {settings.place('disable_jit')}", None, data)
    if system.network:
        step = f"works; a local folder is faster: set {settings.place('cache_dir')}"
        return Check("cache", Status.WARN, f"{text}: a network file system", step, data)
    if system.free_bytes is not None and system.free_bytes < LOW_SPACE:
        return Check("cache", Status.WARN, f"{text}: little space", f"make room, or {elsewhere}", data)
    return Check("cache", Status.OK, text, None, data)


def _read_only() -> Check:
    from megamoe_jit._cache.cache import readonly_caches

    caches, mendings = {}, list[str]()
    for cache in readonly_caches():
        problem = _unusable(cache)
        caches[str(cache.root)] = problem, 0 if problem else len(cache.entries())
        with contextlib.suppress(OSError):
            mendings += filter(None, [problem and mending([cache.path], cache.path)])
    if not caches:
        return Check("read-only", Status.OK, "no read-only caches set", None, {})
    data = {"caches": [{"path": path, "problem": p or None, "entries": n} for path, (p, n) in caches.items()]}
    text = "; ".join(f"{path}: {problem or f'kernels: {count}'}" for path, (problem, count) in caches.items())
    if any(problem or not count for problem, count in caches.values()):
        place = get_settings().place("readonly_cache")
        step = f"correct {place}; `megamoe-jit cache import FILE --cache-dir DIR` fills such a folder"
        step = f"{'; '.join(mendings)}, or name another folder with {place}" if mendings else step
        return Check("read-only", Status.WARN, text, step, data)
    return Check("read-only", Status.OK, text, None, data)


def _unusable(cache: KernelCache) -> str:
    """Why nothing is read from a read-only cache; empty if something may be."""
    try:
        os.stat(cache.root)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return str(error)
    try:
        return _why_not_read(cache.path, cache.forbidden)
    except FileNotFoundError:
        return f"holds no {cache.path.name}"


def _locks() -> Check:
    from megamoe_jit._cache.locks import key_lock, lock_dir

    if get_settings().disable_jit:
        return Check("locks", Status.OK, f"not needed: {compiling_forbidden()}", None, {})
    place = get_settings().place("lock_dir")
    step = f"set {place} to a local folder of your own; until then processes may compile the same kernel"
    try:
        folder = lock_dir()
    except OSError as error:
        return Check("locks", Status.WARN, f"no folder for lock files: {error}", step, {})
    system = file_system(folder)
    data = {"path": str(folder), **asdict(system)}
    text = f"{folder}, {system.type}"
    with key_lock(f"doctor-{os.getpid()}", "a trial lock") as held:
        if not held:
            return Check("locks", Status.WARN, f"{text}: cannot lock", step, data)
    (folder / f"doctor-{os.getpid()}.lock").unlink(missing_ok=True)
    if system.network:
        return Check("locks", Status.WARN, f"{text}: a network file system, where locks may hang", step, data)
    return Check("locks", Status.OK, text, None, data)


def _tools() -> Check:
    found = {name: find_tool(name) for name in TOOLS}
    present = [path for path in found.values() if path]
    if present:
        return Check("tools", Status.OK, ", ".join(present), None, found)
    detail = f"neither {' nor '.join(TOOLS)}; only `inspect --sass` needs one"
    return Check("tools", Status.OK, detail, GET_A_TOOL, found)
