"""What a kernel is compiled for, as values: shape, variant, numeric options, weight format; the name and the shared
memory that follow from them; and what Python and the kernels must agree on (`abi`, written from their headers).

It must not know how a kernel is rendered, compiled, kept or launched, and imports nothing of the package but errors
and text; torch only where a weight format is asked for a dtype or to pack. Kernels of other kinds than `KernelSpec`
are in `any_layer`. A name of this room's imports its module when it is asked for: settings and listings need few.
"""

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from megamoe_jit._spec.abi import MAX_RANKS
    from megamoe_jit._spec.checks import check_clamp, check_flag, check_int
    from megamoe_jit._spec.formats import FORMATS, FP8, FP8_E5M2, MXFP4, WeightFormat
    from megamoe_jit._spec.numerics import Numerics
    from megamoe_jit._spec.shape import BLOCK, MAX_EXPERTS, MAX_SIZE, MAX_TOKENS, MAX_TOPK, MoEShape
    from megamoe_jit._spec.spec import DEFAULT_NUMERICS, KernelSpec
    from megamoe_jit._spec.variants import Variant

_MODULES = {
    "abi": "MAX_RANKS",
    "checks": "check_clamp check_flag check_int",
    "formats": "FORMATS FP8 FP8_E5M2 MXFP4 WeightFormat",
    "numerics": "Numerics",
    "shape": "BLOCK MAX_EXPERTS MAX_SIZE MAX_TOKENS MAX_TOPK MoEShape",
    "spec": "DEFAULT_NUMERICS KernelSpec",
    "variants": "Variant",
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "BLOCK",
    "DEFAULT_NUMERICS",
    "FORMATS",
    "FP8",
    "FP8_E5M2",
    "MAX_EXPERTS",
    "MAX_RANKS",
    "MAX_SIZE",
    "MAX_TOKENS",
    "MAX_TOPK",
    "MXFP4",
    "KernelSpec",
    "MoEShape",
    "Numerics",
    "Variant",
    "WeightFormat",
    "check_clamp",
    "check_flag",
    "check_int",
]


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
