"""From a compiled kernel to a CUDA function on one device.

Loading is forced, never left to the first launch: a lazily loaded kernel takes the context lock while
peers already spin in theirs. The library handle lives as long as the process, since unloading is not
allowed during graph capture. Nothing is compiled or loaded while torch captures a graph; that is refused
before anything is touched, so that the capture stays usable.
"""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass
from typing import Any

from megamoe_jit._compile.cubin import CubinError, read_cubin
from megamoe_jit._compile.wheels import wheel_command
from megamoe_jit._device.driver import checked, name_of
from megamoe_jit._device.launch import LoadedKernel
from megamoe_jit._errors import CaptureError, LoadError, MegaMoeError, UnsupportedDeviceError
from megamoe_jit._jit.kernel import CompiledKernel, warmup_command
from megamoe_jit._jit.obtain import get_kernel, replacement
from megamoe_jit._jit.registry import Life, registry
from megamoe_jit._spec.compilable import Compilable

LOG = logging.getLogger("megamoe_jit")

#: driver errors that mean: this binary is not for this driver or device
_REFUSED = (
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_INVALID_SOURCE",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
)


class Loaded:
    """What was loaded of the kernels of a registry, which keeps it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.of_life: dict[tuple[Life, int], LoadedKernel] = {}  #: by kernel and device
        self.of_key: dict[tuple[str, int], LoadedKernel] = {}  #: settings may differ and the kernel be the same
        self.contexts: dict[int, Any] = {}  #: primary ones, by device

    def after_fork(self) -> None:
        """A child has none of the threads that would release the lock."""
        self.lock = threading.Lock()


def load_kernel(spec: Compilable, device_index: int, *, param_bytes: int | None = None) -> LoadedKernel:
    """Compile if needed, and load into the primary context of a device; once per kernel and device.

    Args:
        spec: the kernel.
        device_index: the CUDA device; its primary context must be current, which it is after
            `torch.cuda.set_device`.
        param_bytes: size of the caller's parameter struct, checked against the kernel's.

    Returns:
        The loaded kernel.

    Raises:
        CaptureError: it is not loaded yet and torch is capturing a graph.
        UnsupportedDeviceError: the device has not compute capability 9.0.
        LoadError: the driver refuses, or the parameter sizes differ.
    """
    kernels = registry()
    life, known = kernels.life(spec), kernels.companion(Loaded)
    loaded = known.of_life.get((life, device_index))
    if loaded is None:
        _refuse_capture(spec)
        if device_index in life.refused:
            raise life.refused[device_index].with_traceback(None)
        compiled = get_kernel(spec)
        with known.lock:
            loaded = known.of_key.get((compiled.key, device_index)) or _load_or_replace(life, compiled, device_index)
            known.of_key[loaded.key, device_index] = known.of_life[life, device_index] = loaded
    if param_bytes is not None and param_bytes != loaded.param_bytes:
        raise LoadError(
            f"kernel {spec.kernel_name} takes {loaded.param_bytes} bytes of parameters, but the host passes "
            f"{param_bytes}; kernels_src/layout/params.cuh and megamoe_jit/_spec/abi.py disagree"
        )
    return loaded


def _refuse_capture(spec: Compilable) -> None:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized() and cuda.is_current_stream_capturing():
        raise CaptureError(
            f"kernel {spec.kernel_name} is used for the first time while a CUDA graph is being captured; call the "
            f"buffer's prepare_all() before the capture, since a call loads the kernel of its own token count alone "
            f"(to compile it ahead of time: {warmup_command(spec)})"
        )


@dataclass(frozen=True, slots=True)
class _Refusal:
    """The driver does not take a binary.

    Attributes:
        message: what to tell the user.
        explained: the compiler is newer than the driver; else the binary itself must be bad.
    """

    message: str
    explained: bool


def _load_or_replace(life: Life, compiled: CompiledKernel, device_index: int) -> LoadedKernel:
    """Load; if the driver refuses what came from a cache, another copy or what is compiled here, once.

    Raises:
        LoadError: it is refused for good, and again without a trial until `retry`.
    """
    refusal = _load(compiled, device_index)
    if isinstance(refusal, LoadedKernel):
        return refusal
    cause: MegaMoeError | None = None
    try:
        other = replacement(compiled, refusal.message, damaged=not refusal.explained)
    except MegaMoeError as error:
        other, cause = None, error
    if other is not None:
        again = _load(other, device_index)
        if isinstance(again, LoadedKernel):
            return again
        refusal = again
    life.refused[device_index] = LoadError(refusal.message)
    raise life.refused[device_index] from cause


def _load(compiled: CompiledKernel, device_index: int) -> LoadedKernel | _Refusal:
    from cuda.bindings import driver

    spec = compiled.spec
    try:
        (kernel_info,) = [k for k in read_cubin(compiled.cubin).entries if k.name == spec.kernel_name]
    except (CubinError, ValueError):
        return _Refusal(f"the cached kernel {compiled.key[:12]} is not {spec.kernel_name}", explained=False)
    _enter_context(driver, device_index, spec)
    status, library = driver.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0)
    if name_of(status) in _REFUSED:
        return _refusal(driver, compiled, name_of(status))
    checked(driver, (status,), f"cuLibraryLoadData({spec.kernel_name})")
    kernel = checked(driver, driver.cuLibraryGetKernel(library, spec.kernel_name.encode()), "cuLibraryGetKernel")
    status, function = driver.cuKernelGetFunction(kernel)
    if name_of(status) in _REFUSED:
        return _refusal(driver, compiled, name_of(status))
    checked(driver, (status,), f"cuKernelGetFunction({spec.kernel_name})")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(
        driver,
        driver.cuFuncSetAttribute(function, attribute, spec.shared_bytes),
        f"raising the shared memory of {spec.kernel_name} to {spec.shared_bytes} bytes",
    )
    return LoadedKernel(spec, compiled.key, device_index, function, kernel_info.param_bytes, compiled, library)


def _enter_context(driver: Any, device_index: int, spec: Compilable) -> None:
    """Make sure the primary context of the device is current, as torch has it."""
    try:
        checked(driver, driver.cuInit(0), "cuInit")
    except RuntimeError as error:  # cuda-bindings found no libcuda
        raise LoadError(f"there is no NVIDIA driver (libcuda.so.1): {error}") from error
    device = checked(driver, driver.cuDeviceGet(device_index), f"cuDeviceGet({device_index})")
    kind = driver.CUdevice_attribute
    major, minor = [
        int(checked(driver, driver.cuDeviceGetAttribute(attribute, device), "cuDeviceGetAttribute"))
        for attribute in (
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    ]
    if (major, minor) != (9, 0):
        raise UnsupportedDeviceError(
            f"device {device_index} has compute capability {major}.{minor}; {spec.kernel_name} needs 9.0 (Hopper)"
        )
    contexts = registry().companion(Loaded).contexts
    primary = contexts.get(device_index)
    if primary is None:
        primary = checked(driver, driver.cuDevicePrimaryCtxRetain(device), "cuDevicePrimaryCtxRetain")
        contexts[device_index] = primary
    current = checked(driver, driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
    if int(current) == 0:
        checked(driver, driver.cuCtxSetCurrent(primary), "cuCtxSetCurrent")
    elif int(current) != int(primary):
        raise LoadError(
            f"the current CUDA context is not the primary context of device {device_index}; "
            f"call torch.cuda.set_device({device_index}) first"
        )


def _refusal(driver: Any, compiled: CompiledKernel, error: str) -> _Refusal:
    status, number = driver.cuDriverGetVersion()
    version = f"{number // 1000}.{number % 1000 // 10}" if int(status) == 0 else "unknown"
    compiler = compiled.meta.get("nvrtc", {}).get("version", "unknown")
    have, need = (int(text.split(".")[0]) if text[:1].isdigit() else 0 for text in (version, compiler))
    explained = need > have > 0
    advice = "the binary is damaged, or not for this device"
    if explained:
        advice = f"install an NVRTC of CUDA {have} ({wheel_command(have)}) or a newer driver"
    return _Refusal(
        f"the driver refuses kernel {compiled.spec.kernel_name} ({error}): compiled by NVRTC {compiler}, "
        f"the driver supports CUDA {version}; {advice} (key {compiled.key[:12]})",
        explained,
    )
