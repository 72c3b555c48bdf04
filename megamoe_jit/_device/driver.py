"""What the NVIDIA driver says of itself and its GPUs, asked through ctypes; and what its answers are.

Asking takes milliseconds, needs neither torch nor the CUDA bindings, and shows the code of a driver that refuses, known
or not.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from typing import Any

from megamoe_jit._documents import Count
from megamoe_jit._errors import LoadError, UnsupportedDeviceError
from megamoe_jit._text import first_line

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR, _SMS = 75, 76, 16  #: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR, _MULTIPROCESSOR_COUNT
#: Names, for a driver too broken to give them.
_NAMES = {
    3: "CUDA_ERROR_NOT_INITIALIZED",
    34: "CUDA_ERROR_STUB_LIBRARY",
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    304: "CUDA_ERROR_OPERATING_SYSTEM",
    802: "CUDA_ERROR_SYSTEM_NOT_READY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    805: "CUDA_ERROR_MPS_CONNECTION_FAILED",
    999: "CUDA_ERROR_UNKNOWN",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver describes it.

    Attributes:
        supported: compute capability 9.0
    """

    index: Count
    name: str
    compute_capability: str
    sms: Count
    memory_bytes: Count
    supported: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """The driver and its GPUs.

    Attributes:
        driver_cuda: newest CUDA version the driver supports, None if there is no driver that works.
        problem: why there is none.
        gpus: those this process may use.
        code: what the driver answered instead of success, None if there is no driver, or one that works.
    """

    driver_cuda: str | None
    problem: str | None
    gpus: tuple[Gpu, ...] = field(default=())
    code: int | None = None


class _Refusal(Exception):
    """The driver answered with a code."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} returned {name} ({code})")
        self.code = code


class _Driver:
    """Calls of the driver's library; a refused one raises `_Refusal`."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            raise _Refusal(name, code, self._name(code))

    def number(self, name: str, *arguments: Any, kind: Any = ctypes.c_int) -> int:
        """The number that a call writes to its first argument."""
        value = kind()
        self.call(name, ctypes.byref(value), *arguments)
        return int(value.value)

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        try:
            self._library.cuGetErrorName(code, ctypes.byref(text))
        except AttributeError:  # a stub
            text.value = None
        return text.value.decode(errors="replace") if text.value else _NAMES.get(code, "an unknown error")


def gpus() -> Machine:
    """What the driver says; never raises because something is missing."""
    try:
        driver = _Driver(_load())
        driver.call("cuInit", 0)
        version = driver.number("cuDriverGetVersion")
        found = tuple(_gpu(driver, index) for index in range(driver.number("cuDeviceGetCount")))
    except _Refusal as refusal:
        return Machine(None, str(refusal), code=refusal.code)
    except (OSError, AttributeError) as error:  # no library, or one that is no driver's
        return Machine(None, first_line(error))
    return Machine(f"{version // 1000}.{version % 1000 // 10}", None, found)


def refuse_without_gpu() -> None:
    """Say in milliseconds that kernels cannot be run here, before torch is imported to find that out.

    Raises:
        UnsupportedDeviceError: the driver offers no Hopper GPU to this process.
    """
    if "torch" in sys.modules:  # it answers as fast, and better: it knows the current device
        return
    machine = gpus()
    if not machine.gpus:
        why = machine.problem or "the driver shows none to this process"
        raise UnsupportedDeviceError(
            f"no GPU here ({why}); this command needs a Hopper GPU (SM90); `megamoe-jit doctor` says more"
        )
    if not any(gpu.supported for gpu in machine.gpus):
        names = ", ".join(f"{gpu.name} has compute capability {gpu.compute_capability}" for gpu in machine.gpus)
        raise UnsupportedDeviceError(f"{names}; this command needs 9.0 (Hopper)")


def _load() -> Any:
    return ctypes.CDLL(LIBRARY)


def _gpu(driver: _Driver, index: int) -> Gpu:
    device = driver.number("cuDeviceGet", index)
    major, minor, sms = (driver.number("cuDeviceGetAttribute", which, device) for which in (_MAJOR, _MINOR, _SMS))
    name = ctypes.create_string_buffer(96)
    driver.call("cuDeviceGetName", name, len(name), device)
    memory = driver.number("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t)
    title = name.value.decode(errors="replace")
    return Gpu(index, title, f"{major}.{minor}", sms, memory, (major, minor) == (9, 0))


def name_of(status: Any) -> str:
    """What an answer of the CUDA bindings is called."""
    return str(getattr(status, "name", status))


def checked(driver: Any, result: tuple[Any, ...], what: str) -> Any:
    """The value that a call of the CUDA bindings gives; raises `LoadError` if it failed."""
    status = result[0]
    if int(status) != 0:
        problem, text = driver.cuGetErrorString(status)
        detail = f" ({bytes(text).decode()})" if int(problem) == 0 and text else ""
        raise LoadError(f"{what} failed: {name_of(status)}{detail}")
    return result[1] if len(result) > 1 else None
