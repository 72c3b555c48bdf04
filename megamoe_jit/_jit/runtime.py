"""What is asked of a process's kernels from above: which a layer needs, warmup, another try, sealing.

A process that is sealed compiles nothing any more.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from megamoe_jit._errors import ConfigError, MegaMoeError
from megamoe_jit._jit.kernel import CompiledKernel
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._jit.registry import registry
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec import FP8, KernelSpec, MoEShape, Variant, WeightFormat, check_flag
from megamoe_jit._spec.any_layer import StageFormat, StageSpec
from megamoe_jit._spec.checks import check, check_callback
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.kinds import AnySpec
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._text import items_of, several, shown

LOG = logging.getLogger("megamoe_jit")
_QUICK_S = 0.1  #: how long an interrupt may go unnoticed; a thread that waits for a lock looks up more often
_BY_NAME = 'preset("v4-flash").shape'  # in messages
_Future = concurrent.futures.Future["WarmupResult"]
_Queue = collections.deque[tuple[_Future, Compilable]]  #: what no thread has begun yet


@dataclass(frozen=True, slots=True)
class WarmupResult:
    """What became of one kernel of a warmup.

    Attributes:
        spec: the kernel.
        kernel: the kernel, None if it failed.
        error: why it failed, None if it did not.
        seconds: how long it took.
    """

    spec: Compilable
    kernel: CompiledKernel | None
    error: Exception | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the kernel is there."""
        return self.error is None


def enumerate_specs(
    shape: MoEShape,
    ranks: int = 1,
    variants: Iterable[Variant] | None = None,
    fast_math: bool | None = True,
    *,
    numerics: Numerics | None = None,
    inputs: str | None = None,
    weights: str = FP8.name,
) -> tuple[KernelSpec | StageSpec, ...]:
    """Every kernel that a call of this shape can pick, whatever its token count; what to warm up.

    Args:
        shape: the layer; `experts` counts all ranks' experts.
        ranks: ranks that share the experts.
        variants: these alone; all that the heuristics can choose if None.
        fast_math: the argument of the calls; None for both.
        numerics: all numeric options of the calls, instead of `fast_math`.
        inputs: "staged" for calls whose inputs are in the buffer before; "raw" for those that stage themselves, as
            `MegaMoE` does, and for `stage`; None for all.
        weights: the name of the format of the weights of the calls, "fp8", "mxfp4" or "fp8e5m2".

    Returns:
        The kernels, each once; those that stage in a launch of their own are `StageSpec`s, and serve all shapes.

    Raises:
        ConfigError: an argument is not supported.
    """
    from megamoe_jit.heuristics.select import all_variants

    allowed = f"a MoEShape, such as {_BY_NAME} (preset is in megamoe_jit.heuristics)"
    check(isinstance(shape, MoEShape), "shape", shape, allowed)
    given = None if variants is None else items_of(variants)
    check(given is not None or variants is None, "variants", variants, "several Variants, or None")
    stored = WeightFormat.parse(weights)
    wanted = all_variants(shape, stored, ranks=ranks) if given is None else given
    flags = (True, False) if fast_math is None else (fast_math,)
    some = [Numerics(flag) for flag in flags] if numerics is None else [numerics]
    forms = tuple(Inputs) if inputs is None else (Inputs.parse(inputs),)
    kinds = itertools.product(forms, wanted, some)
    kernels = dict.fromkeys(
        KernelSpec(shape, v, ranks, numerics=each, weights=stored, inputs=form) for form, v, each in kinds
    )
    return (*kernels, *(StageSpec(form) for form in StageFormat if Inputs.RAW in forms))


def retry() -> None:
    """Forget every failure, so that the kernels concerned are compiled, or loaded, again at their next use."""
    registry().retry()


def forget(spec: Compilable | None = None) -> None:
    """Drop a kernel, or all of them, from memory; cached files stay."""
    registry().forget(spec)


def seal() -> None:
    """From now on this process compiles nothing: a kernel that is not cached raises `KernelMissingError`.

    Call it after warmup, so that an unforeseen kernel is an error at once and not a pause in production.  The
    setting MEGAMOE_JIT_DISABLE_JIT does the same from the start.
    """
    registry().seal()


def unseal() -> None:
    """Take `seal` back; MEGAMOE_JIT_DISABLE_JIT stays in force."""
    registry().seal(False)


def sealed() -> bool:
    """Whether this process may not compile, because of `seal` or of MEGAMOE_JIT_DISABLE_JIT."""
    return registry().sealed


def warmup(
    specs: Iterable[Compilable],
    jobs: int | None = None,
    force: bool = False,
    progress: Callable[[WarmupResult], None] | None = None,
) -> list[WarmupResult]:
    """Compile kernels ahead of time, in threads; needs no GPU.

    Args:
        specs: the kernels; repeated ones count once.
        jobs: threads; the settings' number if None.
        force: compile even what is cached, and replace it.
        progress: called in this thread with each result as it comes; after an interruption with those that were too
            far on to be left.

    Returns:
        One result per kernel, in the order given, with `spec`, `kernel` (None if it failed), `error` (None if it did
        not), `ok` and `seconds`.  Failures are results too, not exceptions.

    Raises:
        ConfigError: these are not specs, or another argument is not what it must be.
    """
    todo = _distinct(specs)
    check(jobs is None or (type(jobs) is int and jobs >= 1), "jobs", jobs, "an integer from 1, or None")
    check_callback("progress", progress)
    check_flag("force", force)
    results: dict[Compilable, WarmupResult] = {}
    workers = max(1, min(jobs or get_settings().jobs, len(todo) or 1))
    stop = threading.Event()
    pool = _threads(workers)

    def report(future: _Future) -> None:
        result = future.result()
        results[result.spec] = result
        if progress is not None:
            progress(result)

    # all there before the first begins: Ctrl-C may come while one is handed out, and its work counts nevertheless
    futures: dict[_Future, Compilable] = {concurrent.futures.Future(): spec for spec in todo}
    queue = collections.deque(futures.items())
    try:
        for _ in futures:
            _hand_out(pool, queue, force, stop)
        for future in _as_they_end(futures):
            report(future)
    except KeyboardInterrupt:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        begun = [future for future, spec in futures.items() if not future.cancel() and spec not in results]
        _tell_running(futures)
        for future in _as_they_end(begun):
            if future.exception() is None:
                with contextlib.suppress(Exception):  # of `progress`: the interruption counts
                    report(future)
        raise
    except BaseException:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    return [results[spec] for spec in todo]


def _threads(count: int) -> concurrent.futures.Executor:
    """So many threads; none where the interpreter ends, as behind the end of a script, and starts no more.

    An executor without threads refuses each order by a `RuntimeError`, as a pool does that can start none.
    """
    try:
        return concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="megamoe-jit-warmup")
    except RuntimeError:
        return concurrent.futures.Executor()


def _hand_out(pool: concurrent.futures.Executor, queue: _Queue, force: bool, stop: threading.Event) -> None:
    """Have one of the threads see to the next kernel; this one does where no thread can be had for it."""
    try:
        pool.submit(_warm_next, queue, force, stop)
    except RuntimeError:
        _warm_next(queue, force, stop)


def _as_they_end(futures: Iterable[_Future]) -> Iterator[_Future]:
    """Each future once it has ended. The main thread wakes up now and then: a signal may reach another one alone."""
    left = set(futures)
    while left:
        ended, left = concurrent.futures.wait(left, _QUICK_S, concurrent.futures.FIRST_COMPLETED)
        yield from ended


def _tell_running(futures: Mapping[_Future, Compilable]) -> None:
    """Say at once what an interrupted warmup still waits for: a kernel that NVRTC has begun on cannot be left alone."""
    running = [future for future in futures if future.running()]
    _, left = concurrent.futures.wait(running, timeout=_QUICK_S)  # what waited for another process ends by itself
    if left:
        names = several((spec.kernel_name for future, spec in futures.items() if future in left), 3)
        LOG.warning("interrupted; waiting for what is being compiled, to keep it (Ctrl-C again leaves it): %s", names)


def _distinct(specs: Iterable[Compilable]) -> list[Compilable]:
    """The specs, each once; raises `ConfigError` if one of them is something else."""
    given = items_of(specs)
    odd = [specs] if given is None else [each for each in given if not isinstance(each, AnySpec)]
    if given is None or odd:
        allowed = f"several KernelSpecs, such as enumerate_specs({_BY_NAME}) (preset is in megamoe_jit.heuristics)"
        raise ConfigError(f"specs: {shown(odd[0])} given; allowed: {allowed}")
    return list(dict.fromkeys(given))


def _warm_next(queue: _Queue, force: bool, stop: threading.Event) -> None:
    """Put what becomes of the next kernel into its future, unless that was cancelled."""
    try:
        future, spec = queue.popleft()
    except IndexError:  # a pool that could start no thread has kept the order, for one that it has already
        return
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(_warm_one(spec, force, stop))
        except BaseException as error:
            future.set_exception(error)
            raise  # where this is no thread of the pool: an interruption leaves the other kernels


def _warm_one(spec: Compilable, force: bool, stop: threading.Event) -> WarmupResult:
    begin = time.perf_counter()
    kernel, failure = None, None
    try:
        kernel = get_kernel(spec, force, stop)
    except Exception as error:
        failure = error
        if not isinstance(error, MegaMoeError):
            LOG.exception("unexpected failure while compiling %s", spec.kernel_name)
    return WarmupResult(spec, kernel, failure, time.perf_counter() - begin)
