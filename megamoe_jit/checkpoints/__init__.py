"""Models' checkpoints as layers: experts by the names that models give them, from safetensors files to weights.

This room knows names, files and kinds of weights. It must not know engines, nor how a kernel runs; nothing of it is
imported before somebody asks, and safetensors only to read.
"""

from __future__ import annotations

from megamoe_jit.checkpoints.convert import convert
from megamoe_jit.checkpoints.inspect import inspect
from megamoe_jit.checkpoints.layer import layer_from_checkpoint
from megamoe_jit.checkpoints.load import load_experts, load_shared_experts

__all__ = ["convert", "inspect", "layer_from_checkpoint", "load_experts", "load_shared_experts"]
