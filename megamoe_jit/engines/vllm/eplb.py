"""Room for NCCL beside a kernel that fills the GPU, while experts are rebalanced."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any

from megamoe_jit._text import first_line
from megamoe_jit.engines.aside import warn_once

_UTILS, _WORKER, _NAME = "vllm.distributed.eplb.eplb_utils", "vllm.v1.worker.gpu_worker", "override_envs_for_eplb"
_LIKE = "deep_gemm_mega_moe"  #: vLLM's own kernel of this kind, for which it bounds NCCL_MAX_CTAS where it must


def leave_room(quantizations: Collection[str]) -> None:
    """Have workers bound NCCL's blocks for this layer as vLLM does it for its own cooperative kernel.

    A launch waits until it has every SM. Weights that NCCL exchanges meanwhile wait for a peer whose launch waits for
    that exchange: without a bound both wait for ever.

    Args:
        quantizations: names of ours.
    """
    utils = importlib.import_module(_UTILS)
    original = getattr(utils, _NAME)
    if getattr(original, "_megamoe_jit", False):
        return

    def override_envs_for_eplb(parallel_config: Any, moe_backend: str | None = None) -> None:
        original(parallel_config, _LIKE if _chosen() in quantizations else moe_backend)

    override_envs_for_eplb._megamoe_jit = True  # type: ignore[attr-defined]
    setattr(utils, _NAME, override_envs_for_eplb)
    worker = sys.modules.get(_WORKER)
    if worker is not None and hasattr(worker, _NAME):
        setattr(worker, _NAME, override_envs_for_eplb)


def _chosen() -> str | None:
    """The quantisation of the model that this worker is to run; whatever goes wrong, others run as before."""
    try:
        config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        warn_once("vllm: room", f"megamoe-jit leaves NCCL_MAX_CTAS to vLLM, whose settings cannot be asked: {reason}")
        return None
    return getattr(getattr(config, "model_config", None), "quantization", None)
