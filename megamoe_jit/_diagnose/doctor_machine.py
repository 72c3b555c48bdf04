"""Checks of what compiles and runs kernels here: compiler, kernel sources, torch, driver, GPU, ready kernels."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megamoe_jit._device.driver import Machine
from megamoe_jit._device.driver_advice import advice
from megamoe_jit._diagnose.finding import Check, Status
from megamoe_jit._diagnose.machine import Compilers, installed
from megamoe_jit._errors import MegaMoeError, ToolchainError
from megamoe_jit._settings.settings import get_settings

if TYPE_CHECKING:
    from megamoe_jit._cache.cache import KernelCache

_TRIAL = 'extern "C" __global__ void megamoe_trial(int* out) { out[threadIdx.x] = threadIdx.x; }\n'


def compiling_forbidden() -> str:
    """What forbids compiling, in words."""
    return f"{get_settings().place('disable_jit')} forbids compiling"


def check_compiler(found: Compilers) -> Check:
    """The NVRTC that is used; none is missed where compiling is forbidden.

    Args:
        found: from `compilers`.
    """
    from megamoe_jit._compile.toolchain import correction, wanted_major
    from megamoe_jit._compile.wheels import wheel_command

    chosen, others, data = found.chosen, found.candidates, asdict(found)
    if get_settings().disable_jit:
        what = f"NVRTC {chosen.version} at {chosen.path}" if chosen else "none"
        return Check("compiler", Status.OK, f"{what}; not needed: {compiling_forbidden()}", None, data)
    if chosen is None:
        step = correction() or "install NVRTC as the message says"
        return Check("compiler", Status.FAIL, str(found.problem), step, data)
    wanted, reason = wanted_major()
    text = f"NVRTC {chosen.version} at {chosen.path}"
    if len(others) > 1:
        text += f" ({len(others)} found)"
    if wanted is not None and int(chosen.version.split(".")[0]) != wanted:
        step = correction() or f"{wheel_command(wanted)}, or set MEGAMOE_JIT_NVRTC"
        return Check("compiler", Status.WARN, f"{text}, but {reason}", step, data)
    return Check("compiler", Status.OK, f"{text}; {reason}", None, data)


def check_sources() -> Check:
    """Whether kernels can be rendered: a small one of each kind is."""
    from megamoe_jit._compile.render import kernels_dir, render
    from megamoe_jit._jit.runtime import enumerate_specs
    from megamoe_jit._spec import FP8, MoEShape, Variant

    settings = get_settings()
    step = "install megamoe-jit again: its kernel sources are not whole"
    if settings.kernels_src is not None:
        place = settings.place("kernels_src")
        step = f"correct {place}: it must hold what the packaged kernels_src holds; without it that one is used"
    data = {"path": str(settings.kernels_src) if settings.kernels_src else None}
    try:
        root = kernels_dir()
        data["path"] = str(root)
        small = enumerate_specs(MoEShape(256, 128, 8, 2), variants=Variant.reading(FP8))
        files = {name for each in small for name in render(each).files}
    except ToolchainError as error:  # the message says what to install
        return Check("sources", Status.FAIL, str(error), "install what the message names", data)
    except MegaMoeError as error:
        return Check("sources", Status.FAIL, str(error), step, data)
    return Check("sources", Status.OK, f"{root}, {len(files)} files", None, data)


def check_torch(machine: Machine) -> Check:
    """The installed torch, and whether it fits the machine."""
    from megamoe_jit._compile.toolchain import installed_torch_cuda

    release = installed("torch")
    if release is None:
        return Check("torch", Status.FAIL, "not installed", "pip install torch", {"version": None, "cuda": None})
    cuda = installed_torch_cuda()
    data = {"version": release, "cuda": cuda}
    if cuda is not None:
        return Check("torch", Status.OK, f"{release}, built for CUDA {cuda}", None, data)
    if machine.gpus:
        step = "install a CUDA build of torch: https://pytorch.org/get-started/locally/"
        return Check("torch", Status.FAIL, f"{release} has no CUDA, and this machine has a GPU", step, data)
    return Check("torch", Status.OK, f"{release}, without CUDA (enough to compile; there is no GPU here)", None, data)


def check_driver(machine: Machine, found: Compilers) -> Check:
    """The driver, and whether it loads what the NVRTC of `found` compiles."""
    from megamoe_jit._compile.toolchain import MINIMUM
    from megamoe_jit._compile.wheels import wheel_command

    nvrtc = found.chosen.version if found.chosen else None
    data: dict[str, Any] = {"driver_cuda": machine.driver_cuda, "nvrtc": nvrtc}
    if machine.code is not None:
        known = advice(machine.code)
        data |= {"problem": machine.problem, "code": machine.code}
        status = Status.FAIL if known.here else Status.WARN
        return Check("driver", status, f"{machine.problem}: {known.cause}", known.step, data)
    if machine.driver_cuda is None:
        step = "to compile kernels, none is needed; to run them, install one, or run the container with GPUs"
        return Check("driver", Status.WARN, "no NVIDIA driver", step, {**data, "problem": machine.problem})
    text = f"supports CUDA {machine.driver_cuda}"
    driver, compiler = int(machine.driver_cuda.split(".")[0]), int((nvrtc or "0").split(".")[0])
    if compiler > driver and not get_settings().disable_jit:
        step = "update the driver"
        if driver >= MINIMUM[0]:
            step = f"{wheel_command(driver)} with a torch for CUDA {driver}, or {step}"
        return Check("driver", Status.FAIL, f"{text}: too old for kernels of NVRTC {nvrtc}", step, data)
    return Check("driver", Status.OK, text, None, data)


def check_gpu(machine: Machine) -> Check:
    """The GPUs, and whether kernels run on them."""
    data = {"gpus": [asdict(gpu) for gpu in machine.gpus]}
    names = ", ".join(f"{gpu.name} (SM {gpu.compute_capability}, {gpu.sms} SMs)" for gpu in machine.gpus)
    if not machine.gpus:
        step = "run on a machine with an H100 or H200; kernels cached here can be taken there (`cache export`)"
        if machine.code is not None and advice(machine.code).here:
            return Check("gpu", Status.WARN, "none: the driver does not start", "see driver above", data)
        text = "none: kernels cannot be run here"
        if not get_settings().disable_jit:
            text = "none: kernels can be compiled here, but not run"
        return Check("gpu", Status.WARN, text, step, data)
    if not any(gpu.supported for gpu in machine.gpus):
        step = "use a GPU of compute capability 9.0 (H100, H200, H20)"
        return Check("gpu", Status.FAIL, f"no Hopper GPU: {names}", step, data)
    if not all(gpu.supported for gpu in machine.gpus):
        step = "choose the Hopper ones with CUDA_VISIBLE_DEVICES"
        return Check("gpu", Status.WARN, f"not all are Hopper: {names}", step, data)
    return Check("gpu", Status.OK, names, None, data)


def check_ready_kernels(machine: Machine) -> Check:
    """Where compiling is forbidden: the kernels in the caches, each read and verified as a call would."""
    from megamoe_jit._cache.cache import searched_caches

    settings = get_settings()
    usable, damaged, left = set[str](), list[str](), Counter[str]()
    for cache in searched_caches():
        for key in cache.keys() if _trusted(cache) else ():
            name, problem = _ready(cache, key, machine)
            if not problem:
                usable.add(name)
            elif problem.startswith("damaged"):
                damaged.append(f"{cache.entry_path(key)}: {problem}")
            else:
                left[problem] += 1
    data = {"usable": sorted(usable), "damaged": damaged, "left": dict(left)}
    parts = [f"usable: {len(usable)}", *(f"{reason}: {count}" for reason, count in sorted(left.items()))]
    text = ", ".join([*parts, f"damaged: {len(damaged)}"] if damaged else parts)
    fill = "`megamoe-jit cache import FILE --cache-dir DIR`"
    if not usable:
        step = f"fill a folder with {fill} and name it in {settings.place('readonly_cache')}, or allow compiling"
        return Check("kernels", Status.FAIL, f"{text}; {compiling_forbidden()}", step, data)
    if damaged:
        step = f"`megamoe-jit cache verify` names them; {fill} replaces them"
        return Check("kernels", Status.WARN, text, step, data)
    return Check("kernels", Status.OK, text, None, data)


def _trusted(cache: KernelCache) -> bool:
    """Whether anything is read from a cache; the checks of the caches say why not."""
    from megamoe_jit._trust import check_private

    try:
        check_private(cache.path, cache.forbidden)
    except OSError:
        return False
    return True


def _ready(cache: KernelCache, key: str, machine: Machine) -> tuple[str, str]:
    """Symbol of a cached kernel, and why a call does not take it; empty if one does."""
    from megamoe_jit._cache.entry import Damaged, OtherSchema
    from megamoe_jit._jit.lookup import Fit, Wanted, fit_of
    from megamoe_jit._spec.kinds import spec_from_json

    other = "of another version, or of other sources or options"
    try:
        meta = cache.peek(key).meta
        spec = spec_from_json(meta["spec"])
        fit = fit_of(Wanted.of(spec), key, meta, cache)
        major = int(meta["nvrtc"]["version"].split(".")[0])
        if fit is Fit.NAME:
            return "", other
        cache.peek(key, spec.kernel_name)
    except OtherSchema:
        return "", other
    except (OSError, Damaged) as error:
        return "", f"damaged: {error}"
    except (LookupError, TypeError, ValueError, MegaMoeError):
        return "", other
    if fit is Fit.SOURCE:
        return "", "compiled here by another NVRTC and not imported"
    if machine.driver_cuda is not None and major > int(machine.driver_cuda.split(".")[0]):
        return "", f"too new for this driver (CUDA {machine.driver_cuda})"
    if meta.get("advisories") and get_settings().strict == "error":
        return "", f"with performance losses, which {get_settings().place('strict')} refuses"
    return spec.kernel_name, ""


def check_trial(found: Compilers) -> Check:
    """Whether a very small kernel compiles; not tried where compiling is forbidden."""
    from megamoe_jit._compile.nvrtc import compile_source
    from megamoe_jit._compile.toolchain import correction, find_toolchain

    if get_settings().disable_jit:
        return Check("trial compile", Status.OK, f"left out: {compiling_forbidden()}", None, {})
    if found.chosen is None:
        return Check("trial compile", Status.FAIL, "not possible without a compiler", "see compiler above", {})
    begin = time.perf_counter()
    try:
        result = compile_source(_TRIAL, kernel_name="megamoe_trial", toolchain=find_toolchain())
    except MegaMoeError as error:
        step = f"see compiler above, or {correction() or 'choose another with MEGAMOE_JIT_NVRTC'}"
        if get_settings().ptxas_options:
            step = f"correct {get_settings().place('ptxas_options')}, or leave it out"
        return Check("trial compile", Status.FAIL, str(error), step, {})
    seconds = time.perf_counter() - begin
    data = {"seconds": seconds, "cubin_bytes": len(result.cubin), "python": sys.version.split()[0]}
    return Check("trial compile", Status.OK, f"{len(result.cubin)} bytes of sm_90a code in {seconds:.2f} s", None, data)
