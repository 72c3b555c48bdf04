"""One kernel from the first place that has it: read-only caches, the user's cache, the compiler.

Everything here happens in the order in which it is cheap: render, look up, look up whatever another compiler made
for us, wait for a process that is compiling the same kernel, compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamoe_jit._cache.cache import CacheEntry, KernelCache, cache_key, searched_caches, user_cache
from megamoe_jit._cache.entry import source_id
from megamoe_jit._cache.locks import key_lock
from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._compile.nvrtc import CompileResult, compile_source, options_for
from megamoe_jit._compile.render import RenderedSource, render
from megamoe_jit._compile.toolchain import ARCH, Toolchain, find_toolchain
from megamoe_jit._errors import KernelMissingError, LoadError, PerformanceLossError, ToolchainError
from megamoe_jit._jit.interrupt import check as check_interrupted
from megamoe_jit._settings.settings import Settings, get_settings
from megamoe_jit._spec.kinds import Spec
from megamoe_jit._text import one_line
from megamoe_jit._version import __version__

__all__ = [
    "CompiledKernel",
    "Origin",
    "Wanted",
    "distrust",
    "known_refusal",
    "obtain",
    "remember_refusal",
    "seal",
    "sealed",
    "trust_again",
    "unseal",
    "warmup_command",
]

LOG = logging.getLogger("megamoe_jit")
Origin = Literal["memory", "pack", "disk", "compiled"]  #: pack: a read-only cache


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel ready to be loaded.

    Attributes:
        spec: what it was compiled for.
        key: its name in the cache.
        cubin: the binary.
        meta: what the cache entry says, or would say.
        origin: where this call found it.
        seconds: how long this call took to get it.
    """

    spec: Spec
    key: str
    cubin: bytes = dataclasses.field(repr=False)
    meta: Metadata = dataclasses.field(repr=False, compare=False)
    origin: Origin
    seconds: float


_sealed = False
_compiled_here: set[str] = set()
_distrusted: set[str] = set()  #: digests of binaries: another copy of the same kernel may be good
_shown: set[Path] = set()  #: entries whose place was logged
_refused: dict[tuple[Settings, Spec, int], LoadError] = {}


def seal() -> None:
    """From now on this process compiles nothing: a kernel that is not cached raises `KernelMissingError`.

    Call it after warmup, so that an unforeseen kernel is an error at once and not a pause in production.  The
    setting MEGAMOE_JIT_DISABLE_JIT does the same from the start.
    """
    global _sealed
    _sealed = True


def unseal() -> None:
    """Take `seal` back; MEGAMOE_JIT_DISABLE_JIT stays in force."""
    global _sealed
    _sealed = False


def sealed() -> bool:
    """Whether this process may not compile, because of `seal` or of MEGAMOE_JIT_DISABLE_JIT."""
    return _sealed or get_settings().disable_jit


def warmup_command(spec: Spec) -> str:
    """The command line that compiles this kernel ahead of time.

    `warmup` makes no kernel with a timeline: only who measures the kernel itself asks for one.  `inspect` makes any.
    """
    options = spec.warmup_options()
    if not options:
        return f"megamoe-jit inspect {spec.entry}"
    settings = get_settings()
    there = f" --cache-dir {shlex.quote(str(settings.cache_dir))}" if settings.source("cache_dir") == "argument" else ""
    return f"megamoe-jit warmup {options}{there}"


def distrust(kernel: CompiledKernel, damaged: bool) -> bool:
    """Do not take this kernel from a cache again: the driver refuses it.

    Args:
        kernel: the kernel.
        damaged: it should have worked; then it is moved to quarantine too, for the sake of other processes.

    Returns:
        Whether compiling it may help; not if it was compiled by this very process.
    """
    _distrusted.add(hashlib.sha256(kernel.cubin).hexdigest())
    if damaged:
        cache = user_cache()
        own = cache.load(kernel.key)  # the kernel may have come from a read-only cache, and this one be good
        if own is not None and own.cubin == kernel.cubin:
            cache.quarantine(kernel.key)
    return kernel.key not in _compiled_here


def remember_refusal(spec: Spec, device_index: int, error: LoadError) -> None:
    """From now on this kernel fails with this error on this device, until `trust_again`."""
    _refused[get_settings(), spec, device_index] = error


def known_refusal(spec: Spec, device_index: int) -> LoadError | None:
    """Why the driver does not take this kernel on this device; None if nothing is known against it."""
    return _refused.get((get_settings(), spec, device_index))


def trust_again() -> None:
    """Forget what the driver refused."""
    _distrusted.clear()
    _refused.clear()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to look for: the exact kernel if there is a compiler to say which, its source in any case."""

    spec: Spec
    source: RenderedSource
    source_id: str
    toolchain: Toolchain | None
    key: str | None
    problem: ToolchainError | None

    @classmethod
    def of(cls, spec: Spec) -> Wanted:
        source = render(spec)
        toolchain, key, problem = None, None, None
        try:
            toolchain = find_toolchain()
            key = cache_key(source.text, options_for(toolchain), spec.entry, ARCH, toolchain)
        except ToolchainError as error:  # kernels that others compiled may do
            problem = error
        identity = source_id(source.text, options_for(toolchain), spec.entry, ARCH)
        return cls(spec, source, identity, toolchain, key, problem)

    @property
    def major(self) -> int | None:
        """CUDA major version of the compiler, if there is one."""
        return self.toolchain.version[0] if self.toolchain else None


def obtain(spec: Spec, force: bool) -> CompiledKernel:
    """A kernel from the first place that has it.

    Args:
        spec: the kernel.
        force: compile it whatever the caches hold, and replace the entry.

    Raises:
        KernelMissingError: it would have to be compiled, which is forbidden.
        RenderError: its source cannot be rendered.
        ToolchainError: there is no compiler.
        CompileError: it does not compile.
    """
    settings = get_settings()
    wanted = Wanted.of(spec)
    if not force:
        found = _from_disk(wanted)
        if found is not None:
            return found
    if sealed():
        why, allow = "this process is sealed", ""
        if settings.disable_jit:  # usually set for the whole shell, where the command is going to be run
            why, allow = "MEGAMOE_JIT_DISABLE_JIT forbids compiling it", "MEGAMOE_JIT_DISABLE_JIT=0 "
        places = [settings.cache_dir, *settings.readonly_cache]
        where = " or ".join(map(str, places[1:] if settings.no_cache else places)) or "(none: MEGAMOE_JIT_NO_CACHE)"
        whose = " (kernels with a timeline are for measuring the kernel alone)" if spec.timeline else ""
        raise KernelMissingError(
            f"kernel {spec.entry} is not in the cache {where} and {why}; run: {allow}{warmup_command(spec)}{whose}"
        )
    if wanted.toolchain is None or wanted.key is None:
        raise wanted.problem or ToolchainError("no compiler")
    key, cache = wanted.key, None if settings.no_cache else user_cache()

    def published() -> bool:
        check_interrupted()
        return not force and cache is not None and cache.holds(key)

    # what will not be published need not be waited for
    keeps = cache is not None and cache.writable()
    with key_lock(key, spec.entry, published) if keeps else contextlib.nullcontext():
        if keeps and not force:
            found = _from_disk(wanted)
            if found is not None:
                return found
        return _compile(wanted, wanted.toolchain, key, cache, force)


def _compile(wanted: Wanted, toolchain: Toolchain, key: str, cache: KernelCache | None, force: bool) -> CompiledKernel:
    spec = wanted.spec
    LOG.info("compiling %s with NVRTC %d.%d", spec.entry, *toolchain.version)
    result = compile_source(wanted.source.text, entry=spec.entry, toolchain=toolchain)
    LOG.info(
        "compiled %s in %.2f s: %d registers, %d bytes of spills",
        spec.entry,
        result.seconds["total"],
        result.registers,
        result.spill_bytes,
    )
    meta = _meta(wanted, result, toolchain)
    _compiled_here.add(key)
    if cache is not None:
        if force:
            cache.remove([key])
        cache.store(key, result.cubin, wanted.source.text, meta)
    meta |= {"key": key, "arch": ARCH}
    return CompiledKernel(spec, key, result.cubin, meta, "compiled", 0.0)


def _from_disk(wanted: Wanted) -> CompiledKernel | None:
    """A stored kernel: exactly the one, else one that somebody built from this source and handed to us."""
    caches, symbol = searched_caches(), wanted.spec.entry
    for cache in caches:
        entry = cache.load(wanted.key, symbol) if wanted.key is not None else None
        if entry is not None and entry.meta["cubin_sha256"] not in _distrusted:
            return _accept(wanted.spec, entry, cache, "")
    for cache in caches:
        entry = cache.load_source(wanted.source_id, wanted.major, _distrusted, symbol)
        if entry is not None:
            return _accept(wanted.spec, entry, cache, ", built elsewhere")
    return None


def _accept(spec: Spec, entry: CacheEntry, cache: KernelCache, remark: str) -> CompiledKernel:
    losses = entry.meta.get("advisories", [])
    strict = get_settings().strict
    if losses and strict == "error":
        raise PerformanceLossError(
            f"cached kernel {spec.entry} ({entry.path}) was compiled with performance losses; "
            "MEGAMOE_JIT_STRICT=warn accepts it\n" + "\n".join(f"  {loss}" for loss in losses)
        )
    if losses and strict == "warn":
        LOG.warning("cached kernel %s has performance losses: %s", spec.entry, "; ".join(losses))
    if entry.path not in _shown:
        _shown.add(entry.path)
        LOG.info("%s: from %s%s", spec.entry, entry.path, remark)
    return CompiledKernel(spec, entry.key, entry.cubin, entry.meta, "pack" if cache.read_only else "disk", 0.0)


def _meta(wanted: Wanted, result: CompileResult, toolchain: Toolchain) -> Metadata:
    spec, kernel = wanted.spec, result.kernel
    return {
        "entry": spec.entry,
        "spec": spec.to_json(),
        "source_id": wanted.source_id,
        "files": [one_line(name) for name in wanted.source.files],
        "options": list(result.options),
        "nvrtc": {
            "version": f"{toolchain.version[0]}.{toolchain.version[1]}",
            "build": toolchain.build,
            "path": one_line(str(toolchain.path)),
        },
        "package_version": __version__,
        "registers": kernel.registers,
        "stack_bytes": result.stack_bytes,
        "spill_bytes": result.spill_bytes,
        "static_shared_bytes": kernel.static_shared_bytes,
        "dynamic_shared_bytes": spec.shared_bytes,
        "param_bytes": kernel.param_bytes,
        "max_threads": kernel.max_threads,
        "diagnostics": len(result.diagnostics),
        "advisories": [one_line(each) for each in result.advisories],
        "compile_ms": {phase: round(value * 1e3, 3) for phase, value in result.seconds.items()},
    }
