"""One kernel from the first place that has it: memory, read-only caches, the user's cache, the compiler.

Everything here happens in the order in which it is cheap: render, look up, look up whatever another compiler made
for us, wait for a process that is compiling the same kernel, compile.  A kernel is compiled once per process, whatever
the number of threads, and once per node, whatever the number of processes.  A failure is remembered: the same kernel
is not compiled again and again, and nobody runs half of one.  The bytes that were just compiled are used from memory;
whether the disk could keep them does not matter.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from megamoe_jit._cache.cache import KernelCache, user_cache
from megamoe_jit._cache.entry import CacheEntry
from megamoe_jit._cache.locks import key_lock
from megamoe_jit._cache.metadata import Metadata
from megamoe_jit._compile.nvrtc import CompileResult, compile_source
from megamoe_jit._compile.toolchain import ARCH, Toolchain
from megamoe_jit._errors import KernelMissingError, PerformanceLossError, ToolchainError
from megamoe_jit._jit.kernel import CompiledKernel, Origin, warmup_command
from megamoe_jit._jit.lookup import Fit, Found, Wanted, lookup
from megamoe_jit._jit.registry import registry
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._text import one_line
from megamoe_jit._version import __version__

LOG = logging.getLogger("megamoe_jit")


def get_kernel(spec: Compilable, force: bool = False, stop: threading.Event | None = None) -> CompiledKernel:
    """The compiled kernel of a spec; compiles it if nobody did yet.

    Args:
        spec: the kernel.
        force: compile it whatever memory and caches hold, and replace the entry.
        stop: once it is set, nothing is begun any more: Ctrl-C reaches the main thread alone.

    Returns:
        The kernel.  Later calls return it from memory.

    Raises:
        KeyboardInterrupt: `stop` is set.
        KernelMissingError: it is not cached, and the process is sealed or the settings forbid compiling.
        RenderError: its source cannot be rendered.
        ToolchainError: there is no compiler to identify or compile it with.
        CompileError: it does not compile.  The same error is raised again until `retry` or `forget`.
    """
    kernels = registry()
    return kernels.once(kernels.life(spec), lambda: _obtain(spec, force, stop), force)


def replacement(kernel: CompiledKernel, why: str, *, damaged: bool) -> CompiledKernel | None:
    """Another binary of a kernel that the driver refuses: a copy of it, or made here; None if this one was made here.

    Args:
        kernel: the refused one, which is not taken from a cache again.
        why: what to tell the user of it.
        damaged: it should have worked; then it is moved to quarantine too, for the sake of other processes.

    Raises:
        MegaMoeError: as `get_kernel`.
    """
    kernels = registry()
    kernels.distrust(kernel.cubin)
    if damaged:
        cache = user_cache()
        own = cache.load(kernel.key)  # the kernel may have come from a read-only cache, and this one be good
        if own is not None and own.cubin == kernel.cubin:
            cache.quarantine(kernel.key)
    if kernels.made(kernel.key):
        return None
    LOG.warning("%s; taking another copy, or compiling it here", why)
    kernels.forget(kernel.spec)
    return get_kernel(kernel.spec)


def _obtain(spec: Compilable, force: bool, stop: threading.Event | None) -> CompiledKernel:
    settings = get_settings()
    wanted = Wanted.of(spec)
    if not force:
        found = _from_disk(wanted)
        if found is not None:
            return found
    if registry().sealed:
        raise _missing(spec)
    if wanted.toolchain is None or wanted.key is None:
        raise wanted.problem or ToolchainError("no compiler")
    key, cache = wanted.key, None if settings.no_cache else user_cache()

    def published() -> bool:
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        return not force and cache is not None and cache.holds(key)

    # what will not be published need not be waited for
    keeps = cache is not None and cache.writable()
    with key_lock(key, spec.kernel_name, published) if keeps else contextlib.nullcontext():
        if keeps and published():  # by another process, while this one waited
            found = _from_disk(wanted)
            if found is not None:
                return found
        return _compile(wanted, wanted.toolchain, key, cache, force)


def _compile(wanted: Wanted, toolchain: Toolchain, key: str, cache: KernelCache | None, force: bool) -> CompiledKernel:
    spec = wanted.spec
    LOG.info("compiling %s with NVRTC %d.%d", spec.kernel_name, *toolchain.version)
    result = compile_source(wanted.source.text, kernel_name=spec.kernel_name, toolchain=toolchain)
    LOG.info(
        "compiled %s in %.2f s: %d registers, %d bytes of spills",
        spec.kernel_name,
        result.seconds["total"],
        result.registers,
        result.spill_bytes,
    )
    meta = _meta(wanted, result, toolchain)
    registry().note_made(key)
    if cache is not None:
        if force:
            cache.remove([key])
        cache.store(key, result.cubin, wanted.source.text, meta)
    meta |= {"key": key, "arch": ARCH}
    return CompiledKernel(spec, key, result.cubin, meta, "compiled", 0.0)


def _missing(spec: Compilable) -> KernelMissingError:
    """It would have to be compiled, which is forbidden."""
    settings = get_settings()
    why, allow = "this process is sealed", ""
    if settings.disable_jit:  # usually set for the whole shell, where the command is going to be run
        why, allow = "MEGAMOE_JIT_DISABLE_JIT forbids compiling it", "MEGAMOE_JIT_DISABLE_JIT=0 "
    places = [settings.cache_dir, *settings.readonly_cache]
    where = " or ".join(map(str, places[1:] if settings.no_cache else places)) or "(none: MEGAMOE_JIT_NO_CACHE)"
    whose = f" ({spec.remark})" if spec.remark else ""
    return KernelMissingError(
        f"kernel {spec.kernel_name} is not in the cache {where} and {why}; run: {allow}{warmup_command(spec)}{whose}"
    )


def _from_disk(wanted: Wanted) -> CompiledKernel | None:
    """A stored kernel: exactly the one, else one that somebody built from this source and handed to us."""
    for found in lookup(wanted, least=Fit.LOADS):
        entry = found.cache.load(found.key, wanted.spec.kernel_name)
        if entry is not None and registry().trusts(entry.meta["cubin_sha256"]):
            return _accept(wanted, found, entry)
    return None


def _accept(wanted: Wanted, found: Found, entry: CacheEntry) -> CompiledKernel:
    spec = wanted.spec
    losses = entry.meta.get("advisories", [])
    strict = get_settings().strict
    if losses and strict == "error":
        raise PerformanceLossError(
            f"cached kernel {spec.kernel_name} ({entry.path}) was compiled with performance losses; "
            "MEGAMOE_JIT_STRICT=warn accepts it\n" + "\n".join(f"  {loss}" for loss in losses)
        )
    if losses and strict == "warn":
        LOG.warning("cached kernel %s has performance losses: %s", spec.kernel_name, "; ".join(losses))
    if registry().first_from(entry.path):
        remark = "" if entry.key == wanted.key else ", built elsewhere"
        LOG.info("%s: from %s%s", spec.kernel_name, entry.path, remark)
    origin: Origin = "pack" if found.cache.read_only else "disk"
    return CompiledKernel(spec, entry.key, entry.cubin, entry.meta, origin, 0.0)


def _meta(wanted: Wanted, result: CompileResult, toolchain: Toolchain) -> Metadata:
    spec, kernel = wanted.spec, result.kernel
    return {
        "entry": spec.kernel_name,
        "spec": spec.to_json(),
        "source_id": wanted.source_id,
        "files": [one_line(name) for name in wanted.source.files],
        "options": list(result.options),
        "nvrtc": {"version": toolchain.release, "build": toolchain.build, "path": one_line(str(toolchain.path))},
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
