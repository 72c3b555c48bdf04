"""Every exception the package raises, in one tree.

::

    MegaMoeError
    ├── ConfigError (also ValueError)      an argument, shape, dtype or setting is not supported
    ├── UnsupportedDeviceError             the GPU is not a Hopper (SM90) or cannot do what was asked
    ├── ToolchainError                     no usable NVRTC, or one that does not fit the driver; no jinja2
    ├── RenderError                        a kernel template could not be rendered
    ├── CompileError                       NVRTC refused the source
    │   └── PerformanceLossError           it compiled, but with spills or serialised WGMMA
    ├── KernelMissingError                 the kernel is not cached and compiling is forbidden
    ├── PackError                          a pack of kernels is damaged, foreign or not to be trusted
    ├── CheckpointError                    a model's files are not there, damaged, or not what their index says
    ├── LoadError                          the driver refused the compiled kernel
    ├── LaunchError                        the driver refused the launch
    ├── CaptureError                       not possible while a CUDA graph is being captured
    ├── RankMismatchError                  ranks disagree on the configuration or the kernel
    ├── PeerTimeoutError                   another rank did not arrive in time
    └── DeviceFaultError                   a kernel gave up waiting, or the CUDA context is broken

All of them pickle, so they cross process boundaries with their message.
"""

from __future__ import annotations

from megamoe_jit._text import printable

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "DeviceFaultError",
    "KernelMissingError",
    "LaunchError",
    "LoadError",
    "MegaMoeError",
    "PackError",
    "PeerTimeoutError",
    "PerformanceLossError",
    "RankMismatchError",
    "RenderError",
    "ToolchainError",
    "UnsupportedDeviceError",
]


class MegaMoeError(Exception):
    """Base of every error this package raises on purpose.

    Its text holds no control characters, whatever was in the names and values that it tells of.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(MegaMoeError, ValueError):
    """An argument, shape, dtype or setting is not supported; says what, which value, what is allowed."""


class UnsupportedDeviceError(MegaMoeError):
    """The device cannot run these kernels (they need compute capability 9.0)."""


class ToolchainError(MegaMoeError):
    """NVRTC, or a Python package that makes kernels, was not found, is too old, or does not fit the driver."""


class RenderError(MegaMoeError):
    """A kernel template or one of its rooms could not be rendered."""


class CompileError(MegaMoeError):
    """NVRTC refused the source; the message holds the log, mapped to template lines."""


class PerformanceLossError(CompileError):
    """The kernel compiled, but ptxas spilled registers or reported a C75xx performance loss."""


class KernelMissingError(MegaMoeError):
    """The kernel is not in the cache and compiling is forbidden; names the warmup command."""


class PackError(MegaMoeError):
    """A pack of kernels is damaged, was made by another version, or holds what no pack should hold."""


class CheckpointError(MegaMoeError):
    """A file of a model's checkpoint is not there, is damaged, or does not hold what its index says."""


class LoadError(MegaMoeError):
    """The driver refused the compiled kernel."""


class LaunchError(MegaMoeError):
    """The driver refused the launch."""


class CaptureError(MegaMoeError):
    """The operation is not possible while a CUDA graph is being captured."""


class RankMismatchError(MegaMoeError):
    """Ranks disagree on the configuration or on the compiled kernel."""


class PeerTimeoutError(MegaMoeError):
    """Another rank did not arrive within the deadline."""


class DeviceFaultError(MegaMoeError):
    """A kernel waited past its deadline and ended itself, or the CUDA context is unusable."""
