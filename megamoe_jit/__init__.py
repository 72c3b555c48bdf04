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
    from megamoe_jit._layer.local_experts import mega_moe_local_experts
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
    from megamoe_jit._nodes.buffer import MultiNodeBuffer
    from megamoe_jit._nodes.calls import fp8_mega_moe_multinode, get_multinode_buffer_for_mega_moe
    from megamoe_jit._nodes.deep_ep import DeepEpExchange
    from megamoe_jit._nodes.exchange import Exchange
    from megamoe_jit._nodes.nccl_ep import NcclEpExchange
    from megamoe_jit._nodes.topology import NodeTopology
    from megamoe_jit._spec import KernelSpec, MoEShape, Variant

#: What each module of ours has; it is imported when one of its names is asked for.
_MODULES = {
    "_errors": (
        "CaptureError CheckpointError CompileError ConfigError DeviceFaultError KernelMissingError LaunchError "
        "LoadError MegaMoeError PackError PeerTimeoutError PerformanceLossError RankMismatchError RenderError "
        "ToolchainError UnsupportedDeviceError"
    ),
    "_jit.pack": "export_pack import_pack",
    "_jit.runtime": "enumerate_specs retry seal sealed unseal warmup",
    "_layer.buffer": "SymmBuffer",
    "_layer.calls": (
        "fp8_mega_moe fp8_mega_moe_cooperative fp8_mega_moe_pingpong get_symm_buffer_for_mega_moe "
        "get_symm_buffer_for_sm90_mega_moe"
    ),
    "_layer.from_mxfp4": "Mxfp4Spread fp8_from_mxfp4 mxfp4_spread",
    "_layer.local_experts": "mega_moe_local_experts",
    "_layer.moe": "MegaMoE",
    "_layer.quantize": "dequantize_activations dequantize_weights quantize_activations quantize_weights",
    "_layer.stage": "mega_moe_pre_dispatch_sm90 stage",
    "_layer.weights": (
        "inverse_transform_weights_for_mega_moe_sm90 is_transformed mark_transformed "
        "transform_weights_for_mega_moe_sm90 weights_metadata"
    ),
    "_nodes.buffer": "MultiNodeBuffer",
    "_nodes.calls": "fp8_mega_moe_multinode get_multinode_buffer_for_mega_moe",
    "_nodes.deep_ep": "DeepEpExchange",
    "_nodes.exchange": "Exchange",
    "_nodes.nccl_ep": "NcclEpExchange",
    "_nodes.topology": "NodeTopology",
    "_spec": "KernelSpec MoEShape Variant",
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "DeepEpExchange",
    "DeviceFaultError",
    "Exchange",
    "KernelMissingError",
    "KernelSpec",
    "LaunchError",
    "LoadError",
    "MegaMoE",
    "MegaMoeError",
    "MoEShape",
    "MultiNodeBuffer",
    "Mxfp4Spread",
    "NcclEpExchange",
    "NodeTopology",
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
    "fp8_mega_moe_multinode",
    "fp8_mega_moe_pingpong",
    "get_multinode_buffer_for_mega_moe",
    "get_symm_buffer_for_mega_moe",
    "get_symm_buffer_for_sm90_mega_moe",
    "import_pack",
    "inverse_transform_weights_for_mega_moe_sm90",
    "is_transformed",
    "mark_transformed",
    "mega_moe_local_experts",
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
