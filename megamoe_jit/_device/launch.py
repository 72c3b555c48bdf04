"""A kernel on a device, and one prepacked launch of it.

Everything that does not change between calls (attributes, block, shared memory, the address of the
parameter block) is laid out once, so that a call costs a fraction of a microsecond of Python. The
parameter block is memory of the caller: what it holds at the moment of the call is what the kernel gets.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from megamoe_jit._errors import DeviceFaultError, LaunchError
from megamoe_jit._jit.kernel import CompiledKernel
from megamoe_jit._spec.abi import PARAMS_ALIGN, THREADS
from megamoe_jit._spec.compilable import Compilable

_ADVICE = {
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": (
        "all blocks must be resident at once: use a grid no larger than the number of SMs, and keep "
        "other kernels and streams (or MPS and green-context limits) from occupying them"
    ),
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "the block does not fit an SM of this device",
    "CUDA_ERROR_INVALID_VALUE": "grid, shared memory or parameters are not what the driver accepts",
    "CUDA_ERROR_INVALID_CONTEXT": "the stream belongs to another device; call torch.cuda.set_device first",
    "CUDA_ERROR_INVALID_HANDLE": "the stream is not valid here; was it made on another device?",
    "CUDA_ERROR_NOT_INITIALIZED": "CUDA is not initialised in this process",
}
_BROKEN = (
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
)


@functools.cache
def _launch_function() -> Callable[[int, int, int, None], int]:
    """`cuLaunchKernelEx` of the driver itself: through the bindings a launch costs twice as much."""
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes, function.restype = (ctypes.c_void_p,) * 4, ctypes.c_int
    return function


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel on one device.

    Attributes:
        spec: what it was compiled for.
        key: its name in the cache.
        device_index: the CUDA device.
        function: the `CUfunction`, with its shared memory limit raised.
        param_bytes: size of its parameter.
        compiled: the kernel it was loaded from.
        library: the `CUlibrary`, kept so that it is never unloaded.
    """

    spec: Compilable
    key: str
    device_index: int
    function: Any
    param_bytes: int
    compiled: CompiledKernel = dataclasses.field(repr=False)
    library: Any = dataclasses.field(repr=False)


class Launcher:
    """Launches one loaded kernel with one parameter block.

    Not safe for use from several threads at once: make one per thread.

    Args:
        loaded: the kernel; it takes one struct by value.
        params: that struct, at an address that is a multiple of 64.  It is read at every launch.
        threads: of a block.
        cooperative: all blocks must be resident at once.

    Raises:
        LaunchError: the struct has not the kernel's size, or is not aligned.
    """

    __slots__ = (
        *("_arguments", "_call", "_config", "_function", "_grid", "_keep", "_loaded", "_stream", "_threads", "_where"),
    )

    def __init__(
        self, loaded: LoadedKernel, params: ctypes.Structure, *, threads: int = THREADS, cooperative: bool = True
    ) -> None:
        from cuda.bindings import driver

        size, address = ctypes.sizeof(params), ctypes.addressof(params)
        if size != loaded.param_bytes:
            raise LaunchError(f"{loaded.spec.kernel_name} takes {loaded.param_bytes} bytes of parameters, not {size}")
        if address % PARAMS_ALIGN:
            raise LaunchError(f"parameters of {loaded.spec.kernel_name} must be {PARAMS_ALIGN}-byte aligned")
        attributes = []
        if cooperative:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attributes[-1].value.cooperative = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = 1, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = loaded.spec.shared_bytes
        config.hStream = 0
        config.attrs = attributes
        config.numAttrs = len(attributes)
        pointers = (ctypes.c_void_p * 1)(address)
        self._keep = (params, pointers, attributes)
        self._loaded, self._threads = loaded, threads
        self._config: Any = config
        self._call = _launch_function()
        self._where, self._function = int(config.getPtr()), int(loaded.function)
        self._arguments = ctypes.addressof(pointers)
        self._grid = 1
        self._stream = 0

    def launch(self, grid: int, stream: int) -> None:
        """Enqueue the kernel with the parameters as they are now.

        Args:
            grid: number of blocks, at most the number of SMs.
            stream: the raw handle, such as `torch.cuda.current_stream().cuda_stream`.

        Raises:
            LaunchError: the driver refuses.
            DeviceFaultError: an earlier kernel broke the context.
        """
        config = self._config
        if grid != self._grid:
            config.gridDimX = grid
            self._grid = grid
        if stream != self._stream:
            config.hStream = stream
            self._stream = stream
        status = self._call(self._where, self._function, self._arguments, None)
        if status:
            self._fail(status)

    def _fail(self, status: int) -> NoReturn:
        from cuda.bindings import driver

        try:
            name = driver.CUresult(status).name
        except ValueError:  # of a driver that is newer than the bindings
            name = str(status)
        spec = self._loaded.spec
        what = (
            f"launching {spec.kernel_name} failed with {name} (grid {self._grid}, block {self._threads}, "
            f"{spec.shared_bytes} bytes of shared memory, device {self._loaded.device_index})"
        )
        if name in _BROKEN:
            raise DeviceFaultError(
                f"{what}: an earlier kernel broke the CUDA context (check() of its buffer says whether it waited in "
                "vain); end this process and start again"
            )
        advice = _ADVICE.get(name)
        raise LaunchError(f"{what}: {advice}" if advice else what)
