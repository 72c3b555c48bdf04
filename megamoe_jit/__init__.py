"""One FP8 Mixture-of-Experts layer as one kernel launch on NVIDIA Hopper, compiled at first use.

Importing this package imports neither torch nor the CUDA bindings; the first use of a name does.
"""

from __future__ import annotations

import importlib

from megamoe_jit._version import __version__

TYPE_CHECKING = False  # as of typing, which takes a third of the time in which Ctrl-C ends in Python's own traceback
if TYPE_CHECKING:
    from typing import Any

    from megamoe_jit._errors import (
        CaptureError,
        CheckpointError,
        CompileError,
        ConfigError,
        DeviceFaultError,
        KernelMissingError,
        LaunchError,
        LoadError,
        MegaMoeError,
        PackError,
        PeerTimeoutError,
        PerformanceLossError,
        RankMismatchError,
        RenderError,
        ToolchainError,
        UnsupportedDeviceError,
    )
    from megamoe_jit._jit.pack import export_pack, import_pack
    from megamoe_jit._jit.runtime import enumerate_specs, retry, seal, sealed, unseal, warmup
    from megamoe_jit._layer.buffer import SymmBuffer
    from megamoe_jit._layer.calls import (
        fp8_mega_moe,
        fp8_mega_moe_cooperative,
        fp8_mega_moe_pingpong,
        get_symm_buffer_for_mega_moe,
        get_symm_buffer_for_sm90_mega_moe,
    )
    from megamoe_jit._layer.from_mxfp4 import Mxfp4Spread, fp8_from_mxfp4, mxfp4_spread
    from megamoe_jit._layer.moe import MegaMoE
    from megamoe_jit._layer.quantize import (
        dequantize_activations,
        dequantize_weights,
        quantize_activations,
        quantize_weights,
    )
    from megamoe_jit._layer.stage import mega_moe_pre_dispatch_sm90, stage
    from megamoe_jit._layer.weights import (
        inverse_transform_weights_for_mega_moe_sm90,
        is_transformed,
        mark_transformed,
        transform_weights_for_mega_moe_sm90,
        weights_metadata,
    )
    from megamoe_jit._spec import KernelSpec, MoEShape, Variant

#: Where each name lives; its module is imported when it is asked for.
_LAZY = {
    **dict.fromkeys(
        (
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
        ),
        "_errors",
    ),
    **dict.fromkeys(("KernelSpec", "MoEShape", "Variant"), "_spec"),
    "MegaMoE": "_layer.moe",
    "Mxfp4Spread": "_layer.from_mxfp4",
    "SymmBuffer": "_layer.buffer",
    "dequantize_activations": "_layer.quantize",
    "dequantize_weights": "_layer.quantize",
    "enumerate_specs": "_jit.runtime",
    "export_pack": "_jit.pack",
    "fp8_from_mxfp4": "_layer.from_mxfp4",
    "fp8_mega_moe": "_layer.calls",
    "fp8_mega_moe_cooperative": "_layer.calls",
    "fp8_mega_moe_pingpong": "_layer.calls",
    "get_symm_buffer_for_mega_moe": "_layer.calls",
    "get_symm_buffer_for_sm90_mega_moe": "_layer.calls",
    "import_pack": "_jit.pack",
    "inverse_transform_weights_for_mega_moe_sm90": "_layer.weights",
    "is_transformed": "_layer.weights",
    "mark_transformed": "_layer.weights",
    "mega_moe_pre_dispatch_sm90": "_layer.stage",
    "mxfp4_spread": "_layer.from_mxfp4",
    "quantize_activations": "_layer.quantize",
    "quantize_weights": "_layer.quantize",
    "retry": "_jit.runtime",
    "seal": "_jit.runtime",
    "sealed": "_jit.runtime",
    "stage": "_layer.stage",
    "transform_weights_for_mega_moe_sm90": "_layer.weights",
    "unseal": "_jit.runtime",
    "warmup": "_jit.runtime",
    "weights_metadata": "_layer.weights",
}

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "DeviceFaultError",
    "KernelMissingError",
    "KernelSpec",
    "LaunchError",
    "LoadError",
    "MegaMoE",
    "MegaMoeError",
    "MoEShape",
    "Mxfp4Spread",
    "PackError",
    "PeerTimeoutError",
    "PerformanceLossError",
    "RankMismatchError",
    "RenderError",
    "SymmBuffer",
    "ToolchainError",
    "UnsupportedDeviceError",
    "Variant",
    "__version__",
    "dequantize_activations",
    "dequantize_weights",
    "enumerate_specs",
    "export_pack",
    "fp8_from_mxfp4",
    "fp8_mega_moe",
    "fp8_mega_moe_cooperative",
    "fp8_mega_moe_pingpong",
    "get_symm_buffer_for_mega_moe",
    "get_symm_buffer_for_sm90_mega_moe",
    "import_pack",
    "inverse_transform_weights_for_mega_moe_sm90",
    "is_transformed",
    "mark_transformed",
    "mega_moe_pre_dispatch_sm90",
    "mxfp4_spread",
    "quantize_activations",
    "quantize_weights",
    "retry",
    "seal",
    "sealed",
    "stage",
    "transform_weights_for_mega_moe_sm90",
    "unseal",
    "warmup",
    "weights_metadata",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
