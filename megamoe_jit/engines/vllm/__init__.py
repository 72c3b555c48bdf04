"""The plug-in of vLLM: `--quantization megamoe_jit` runs the experts of FP8 checkpoints as this layer.

`register` is the entry point of group `vllm.general_plugins`, called in every process of an engine before it starts.
"""

from __future__ import annotations

from megamoe_jit.engines.aside import guarded
from megamoe_jit.engines.seams import fits

__all__ = ["register"]


@guarded("vllm")
def register() -> None:
    """Add the quantisation to vLLM, if the installed release is as expected; else warn once and leave it alone."""
    from megamoe_jit.engines.vllm import seams

    if not fits("vllm", seams.SEAMS):
        return
    from megamoe_jit.engines.vllm import eplb, quantization

    quantization.add()
    eplb.leave_room(quantization.NAMES)
