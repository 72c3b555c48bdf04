"""From a `KernelSpec` to a compiled kernel: memory, then disk, then the compiler.

A kernel is compiled once per process, whatever the number of threads, and once per node, whatever the
number of processes. A failure is remembered: the same kernel is not compiled again and again, and nobody
runs half of one. The bytes that were just compiled are used from memory; whether the disk could keep them
does not matter.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamoe_jit._cache import KernelCache, cache_key
from megamoe_jit._compiler import CompileResult, compile_source, options_for
from megamoe_jit._errors import KernelMissingError, MegaMoeError, PerformanceLossError
from megamoe_jit._locks import key_lock
from megamoe_jit._render import RenderedSource, render
from megamoe_jit._settings import Settings, get_settings
from megamoe_jit._spec import KernelSpec
from megamoe_jit._toolchain import ARCH, Toolchain, find_toolchain
from megamoe_jit._version import __version__

__all__ = [
    "CompiledKernel",
    "WarmupResult",
    "forget",
    "get_kernel",
    "kernel_cache",
    "kernel_key",
    "retry",
    "warmup",
    "warmup_command",
]

LOG = logging.getLogger("megamoe_jit")
Origin = Literal["memory", "disk", "compiled"]


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

    spec: KernelSpec
    key: str
    cubin: bytes = dataclasses.field(repr=False)
    meta: dict[str, Any] = dataclasses.field(repr=False, compare=False)
    origin: Origin
    seconds: float


@dataclass(frozen=True, slots=True)
class WarmupResult:
    """What became of one kernel of a warmup.

    Attributes:
        spec: the kernel.
        kernel: the kernel, None if it failed.
        error: why it failed, None if it did not.
        seconds: how long it took.
    """

    spec: KernelSpec
    kernel: CompiledKernel | None
    error: Exception | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the kernel is there."""
        return self.error is None


_Job = tuple[Settings, KernelSpec]
_lock = threading.Lock()
_memory: dict[_Job, CompiledKernel] = {}
_failed: dict[_Job, MegaMoeError] = {}
_running: dict[_Job, concurrent.futures.Future[CompiledKernel]] = {}


def _after_fork() -> None:
    """A child has none of the threads that would finish what was running."""
    global _lock
    _lock = threading.Lock()
    _running.clear()


os.register_at_fork(after_in_child=_after_fork)


@functools.lru_cache(maxsize=8)
def _cache_at(root: Path) -> KernelCache:
    return KernelCache(root)


def kernel_cache() -> KernelCache:
    """The cache of the current settings."""
    return _cache_at(get_settings().cache_dir)


def kernel_key(spec: KernelSpec) -> str:
    """The cache key of a kernel: renders it and identifies the compiler, but compiles nothing."""
    return _identify(spec)[0]


def warmup_command(spec: KernelSpec) -> str:
    """The command line that compiles exactly this kernel ahead of time."""
    shape = spec.shape
    return (
        f"megamoe-jit warmup --hidden {shape.hidden} --intermediate {shape.intermediate} "
        f"--experts {shape.experts} --topk {shape.topk} --ranks {spec.ranks} --variant {spec.variant.value}"
        + ("" if spec.fast_math else " --no-fast-math")
    )


def get_kernel(spec: KernelSpec) -> CompiledKernel:
    """The compiled kernel of a spec; compiles it if nobody did yet.

    Args:
        spec: the kernel.

    Returns:
        The kernel.  Later calls return it from memory.

    Raises:
        KernelMissingError: it is not cached and the settings forbid compiling.
        RenderError: its source cannot be rendered.
        ToolchainError: there is no compiler to identify or compile it with.
        CompileError: it does not compile.  The same error is raised again until `retry` or `forget`.
    """
    return _get(spec, force=False)


def retry() -> None:
    """Forget every failure, so that the kernels concerned are tried again."""
    with _lock:
        _failed.clear()


def forget(spec: KernelSpec | None = None) -> None:
    """Drop a kernel, or all of them, from memory; cached files stay."""
    with _lock:
        for job in [j for j in (*_memory, *_failed) if spec is None or j[1] == spec]:
            _memory.pop(job, None)
            _failed.pop(job, None)


def warmup(
    specs: Iterable[KernelSpec],
    jobs: int | None = None,
    force: bool = False,
    progress: Callable[[WarmupResult], None] | None = None,
) -> list[WarmupResult]:
    """Compile kernels ahead of time, in threads; needs no GPU.

    Args:
        specs: the kernels; repeated ones count once.
        jobs: threads; the settings' number if None.
        force: compile even what is cached, and replace it.
        progress: called in this thread with each result as it comes.

    Returns:
        One result per kernel, in the order given.  Failures are results too, not exceptions.
    """
    todo = list(dict.fromkeys(specs))
    results: dict[KernelSpec, WarmupResult] = {}
    workers = max(1, min(jobs or get_settings().jobs, len(todo) or 1))
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="megamoe-jit-warmup")
    try:
        futures = [pool.submit(_warm_one, spec, force) for spec in todo]
        for future in concurrent.futures.as_completed(futures):
            result = future.result()
            results[result.spec] = result
            if progress is not None:
                progress(result)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[spec] for spec in todo]


def _warm_one(spec: KernelSpec, force: bool) -> WarmupResult:
    begin = time.perf_counter()
    kernel, failure = None, None
    try:
        kernel = _get(spec, force)
    except Exception as error:
        failure = error
        if not isinstance(error, MegaMoeError):
            LOG.exception("unexpected failure while compiling %s", spec.entry)
    return WarmupResult(spec, kernel, failure, time.perf_counter() - begin)


def _get(spec: KernelSpec, force: bool) -> CompiledKernel:
    job = (get_settings(), spec)
    if not force:
        known = _memory.get(job)
        if known is not None:
            return known
    begin = time.perf_counter()
    with _lock:
        if force:
            _failed.pop(job, None)
        elif job in _memory:
            return _memory[job]
        if job in _failed:
            raise _failed[job].with_traceback(None)
        future = _running.get(job)
        mine = future is None
        if future is None:
            future = _running[job] = concurrent.futures.Future()
    if not mine:
        kernel = future.result()
        return dataclasses.replace(kernel, origin="memory", seconds=time.perf_counter() - begin)
    try:
        kernel = _obtain(spec, force)
    except BaseException as error:
        with _lock:
            if isinstance(error, MegaMoeError) and not isinstance(error, KernelMissingError):
                _failed[job] = error
            del _running[job]
        future.set_exception(error)
        raise
    kernel = dataclasses.replace(kernel, seconds=time.perf_counter() - begin)
    with _lock:
        _memory[job] = dataclasses.replace(kernel, origin="memory", seconds=0.0)
        del _running[job]
    future.set_result(kernel)
    return kernel


def _identify(spec: KernelSpec) -> tuple[str, RenderedSource, Toolchain, tuple[str, ...]]:
    source = render(spec)
    toolchain = find_toolchain()
    options = options_for(toolchain)
    return cache_key(source.text, options, spec.entry, ARCH, toolchain), source, toolchain, options


def _obtain(spec: KernelSpec, force: bool) -> CompiledKernel:
    settings = get_settings()
    key, source, toolchain, _ = _identify(spec)
    if not force:
        found = _from_disk(spec, key)
        if found is not None:
            return found
    if settings.disable_jit:
        raise KernelMissingError(
            f"kernel {spec.entry} is not in the cache {settings.cache_dir} and MEGAMOE_JIT_DISABLE_JIT "
            f"forbids compiling it; run: {warmup_command(spec)}"
        )
    with key_lock(key, spec.entry):
        if not force:
            found = _from_disk(spec, key)
            if found is not None:
                return found
        LOG.info("compiling %s with NVRTC %d.%d", spec.entry, *toolchain.version)
        result = compile_source(source.text, entry=spec.entry, toolchain=toolchain)
        LOG.info(
            "compiled %s in %.2f s: %d registers, %d bytes of spills",
            spec.entry,
            result.seconds["total"],
            result.registers,
            result.spill_bytes,
        )
        meta = _meta(spec, source, result, toolchain)
        cache = kernel_cache()
        if force:
            cache.remove(key)
        cache.store(key, result.cubin, source.text, meta)
    return CompiledKernel(spec, key, result.cubin, {**meta, "key": key, "arch": ARCH}, "compiled", 0.0)


def _from_disk(spec: KernelSpec, key: str) -> CompiledKernel | None:
    entry = kernel_cache().load(key)
    if entry is None:
        return None
    losses: Sequence[str] = entry.meta.get("advisories") or ()
    strict = get_settings().strict
    if losses and strict == "error":
        raise PerformanceLossError(
            f"cached kernel {spec.entry} ({entry.path}) was compiled with performance losses; "
            "MEGAMOE_JIT_STRICT=warn accepts it\n" + "\n".join(f"  {loss}" for loss in losses)
        )
    if losses and strict == "warn":
        LOG.warning("cached kernel %s has performance losses: %s", spec.entry, "; ".join(losses))
    return CompiledKernel(spec, key, entry.cubin, entry.meta, "disk", 0.0)


def _meta(spec: KernelSpec, source: RenderedSource, result: CompileResult, toolchain: Toolchain) -> dict[str, Any]:
    kernel = result.kernel
    return {
        "entry": spec.entry,
        "spec": spec.to_json(),
        "files": list(source.files),
        "options": list(result.options),
        "nvrtc": {
            "version": f"{toolchain.version[0]}.{toolchain.version[1]}",
            "build": toolchain.build,
            "path": str(toolchain.path),
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
        "advisories": list(result.advisories),
        "compile_ms": {phase: round(value * 1e3, 3) for phase, value in result.seconds.items()},
    }
