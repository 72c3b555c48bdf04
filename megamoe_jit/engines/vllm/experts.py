"""The experts of vLLM's modular kernel: one launch from bf16 to bf16, on one rank or over all ranks of the EP group.

Where vLLM would dispatch tokens to other ranks, the kernel does it, and both steps around it pass everything on. Where
it would not, under tensor parallelism, a rank runs its experts, or its part of each, and vLLM sums the results.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import from_bf16
from megamoe_jit._layer.bound_kernel import SeenTensors
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.given_weights import WeightTensors, format_of
from megamoe_jit._layer.weights import is_transformed, mark_transformed
from megamoe_jit._spec import MoEShape, WeightFormat
from megamoe_jit.engines.across import buffer_across
from megamoe_jit.engines.held import HeldExperts
from megamoe_jit.engines.local import CAPACITY, LocalExperts
from megamoe_jit.engines.vllm.seams import MOE

_NO_SCRATCH = (0,)
_PARTS = ("weight", "weight_scale_inv"), ("weight", "weight_scale")  #: of FP8, and of MXFP4
_BLOCKS = "weight_block_scale"  #: what the kernel reads of MXFP4 besides codes and exponents


def is_across_ranks(parallel: Any) -> bool:
    """Whether the kernel carries tokens from rank to rank: with data and expert parallelism."""
    return bool(parallel.use_all2all_kernels)


def prepare_finalize(moe: Any, quant_config: Any, experts: Any) -> Any:
    """The steps around the experts: they pass everything on where the kernel reaches all ranks, else vLLM's own."""
    if is_across_ranks(moe.moe_parallel_config):
        return _pass_through_class()(experts)
    make = importlib.import_module(f"{MOE}.all2all_utils").maybe_make_prepare_finalize
    return make(moe, quant_config, allow_new_interface=True, use_monolithic=False)


@functools.cache
def _pass_through_class() -> Any:
    base: Any = importlib.import_module(f"{MOE}.prepare_finalize.no_dp_ep").MoEPrepareAndFinalizeNoDPEPModular

    class PassThrough(base):  # type: ignore[misc]
        """Hands activations and routing to experts that dispatch and combine themselves."""

        def __init__(self, experts: Any) -> None:
            super().__init__()
            self._experts = experts

        def output_is_reduced(self) -> bool:
            return True

        def supports_deferred_moe_finalize(self) -> bool:
            return False

        def prepare(
            self, a1: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, None, None, None, None]:
            if not a1.shape[0]:  # vLLM calls no experts then, and the other ranks' would wait for them
                self._experts.run(a1, topk_ids, topk_weights)
            return a1, None, None, None, None

    return PassThrough


@functools.cache
def experts_class() -> Any:
    """The class, a subclass of vLLM's, which is imported only here."""
    mk = importlib.import_module(f"{MOE}.modular_kernel")
    silu = importlib.import_module(f"{MOE}.activation").MoEActivation.SILU
    no_op = importlib.import_module(f"{MOE}.topk_weight_and_reduce").TopKWeightAndReduceNoOP
    keys = importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils")
    platforms = importlib.import_module("vllm.platforms")
    base: Any = mk.FusedMoEExpertsModular

    class MegaMoeExperts(base):  # type: ignore[misc]
        """Runs a batch through the experts of a layer, with weights in the kernel's order."""

        @staticmethod
        def activation_format() -> Any:
            return mk.FusedMoEActivationFormat.Standard

        @staticmethod
        def _supports_current_device() -> bool:
            platform = platforms.current_platform
            return bool(platform.is_cuda() and platform.is_device_capability(90))

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return False

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            fp8 = (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym)
            return weight_key == keys.kMxfp4Static or (weight_key, activation_key) == fp8

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return bool(activation == silu)

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            return not moe_parallel_config.use_batched_activation_format

        @staticmethod
        def _supports_shape(hidden_dim: int) -> bool:
            return hidden_dim % 128 == 0

        @staticmethod
        def _supports_batch_invariance() -> bool:
            return True  # a row's bits depend on that row alone

        @property
        def expects_unquantized_inputs(self) -> bool:
            return True

        def finalize_weight_and_reduce_impl(self) -> Any:
            return no_op()

        def workspace_shapes(self, M: int, N: int, K: int, *_: Any, **__: Any) -> tuple[tuple[int, ...], ...]:
            return _NO_SCRATCH, _NO_SCRATCH, (M, K)

        def process_weights_after_loading(self, layer: Any) -> None:
            """Take a layer over, in place, and make its buffer; with several ranks a collective.

            Its parameters are read at each call, since a reload may exchange them.

            Raises:
                MegaMoeError: there is no kernel of these sizes, or no memory.
            """
            weights, names = _take(layer)
            self._runner = _runner_of(self.moe_config, layer, weights)
            self._layer, (self._l1, self._l2) = layer, names
            self._seen = SeenTensors(())  #: whose order is known

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: torch.Tensor | None,
            *_: Any,
            **__: Any,
        ) -> None:
            y = output if output.dtype is torch.bfloat16 else None
            found = self.run(hidden_states, topk_ids, topk_weights, expert_map, y)
            if y is None:
                output.copy_(found)

        def run(
            self,
            x: torch.Tensor,
            ids: torch.Tensor,
            weights: torch.Tensor,
            expert_map: torch.Tensor | None = None,
            y: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """A batch through the experts, into a new tensor unless there is one; of all ranks where they all call."""
            held = self._layer._parameters
            l1, l2 = (tuple(held[name] for name in names) for names in (self._l1, self._l2))
            self._seen = _recognised(self._seen, l1, l2)
            clamp = self.quant_config.gemm1_clamp_limit
            if isinstance(self._runner, LocalExperts):
                return self._runner(l1, l2, x, _on_this_rank(ids, expert_map), weights, clamp, y=y)
            return from_bf16.mega_moe_from_bf16(x, ids, weights, l1, l2, self._runner, y=y, activation_clamp=clamp)

    return MegaMoeExperts


def _take(layer: Any) -> tuple[WeightFormat, list[tuple[str, ...]]]:
    """Bring a layer's experts into the kernel's order where they are, unless they are in it.

    Nothing is kept of them: a reload processes tensors that are given up when they were copied over the layer's own.

    Returns:
        Their format, and the names of the parameters that a call takes, of both matrices.
    """
    parts = next((pair for pair in _PARTS if hasattr(layer, f"w13_{pair[1]}")), _PARTS[0])
    names = [tuple(f"{matrix}_{part}" for part in parts) for matrix in ("w13", "w2")]
    w13, w2 = (tuple(getattr(layer, name).data for name in each) for each in names)
    if is_transformed(w13, w2):
        weights = format_of("w13", w13)
    else:
        held = HeldExperts(w13, w2)
        held.to_kernel()
        weights = held.weights
        for matrix, given in (("w13", held.l1), ("w2", held.l2)):
            if weights.group:  # a parameter, since vLLM moves experts as slices of those
                blocks = torch.nn.Parameter(given[2], requires_grad=False)
                layer.register_parameter(f"{matrix}_{_BLOCKS}", blocks)
    if weights.group:
        names = [(*each, f"{each[0].partition('_')[0]}_{_BLOCKS}") for each in names]
    return weights, names


def _recognised(seen: SeenTensors, l1: WeightTensors, l2: WeightTensors) -> SeenTensors:
    """These weights, marked as in the kernel's order unless they are those seen last.

    Where vLLM offloads layers to the CPU it copies them for a call, some parameters or all, often to where the copies
    of the call before lay: other tensors, without a mark.
    """
    held = (*l1, *l2)
    if seen.is_of(held):
        return seen
    if not is_transformed(l1, l2):
        mark_transformed(l1, l2)
    return SeenTensors(held)


def _runner_of(moe: Any, layer: Any, weights: WeightFormat) -> LocalExperts | SymmBuffer:
    """What runs a batch: experts of this rank, or a buffer over all ranks of the EP group, which all call."""
    hidden, intermediate = moe.hidden_dim, moe.intermediate_size_per_partition
    parallel, topk = moe.moe_parallel_config, moe.experts_per_token
    if not is_across_ranks(parallel):
        shape, device = MoEShape(hidden, intermediate, layer.w13_weight.shape[0], topk), layer.w13_weight.device
        return LocalExperts(shape, device, min(CAPACITY, max(moe.max_num_tokens, 128)), weights)
    _require_in_order(layer.expert_map, parallel)
    group = importlib.import_module("vllm.distributed.parallel_state").get_ep_group().device_group
    sizes = (moe.num_experts, moe.max_num_tokens, topk, hidden, intermediate)
    return buffer_across(group, *sizes, weights=(weights,))


def _require_in_order(expert_map: torch.Tensor | None, parallel: Any) -> None:
    """Raise unless a rank has consecutive experts, as the kernel knows them."""
    if expert_map is None:
        return
    here = (expert_map.cpu() >= 0).nonzero().flatten()
    first = parallel.ep_rank * (len(expert_map) // parallel.ep_size)
    if here.tolist() != list(range(first, first + len(here))):
        raise ConfigError(
            "experts are not placed rank by rank; allowed: --expert-placement-strategy linear, which is vLLM's default"
        )


def _on_this_rank(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Experts by numbers on this rank, -1 for those of others."""
    if expert_map is None:
        return ids
    return torch.where(ids < 0, -1, expert_map[ids.clamp_min(0)])  # -1 would be the last one
