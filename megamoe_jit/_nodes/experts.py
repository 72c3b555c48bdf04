"""The experts that one kernel launch spans, in a buffer that rows of other nodes arrive in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megamoe_jit._device.sms import sm_count
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_weights
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.memory import mask_rows
from megamoe_jit._nodes.exchange import Arrived, Rows
from megamoe_jit._spec import FP8, MAX_TOKENS, MoEShape, WeightFormat, check_clamp, check_flag
from megamoe_jit._spec.checks import check
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics, numerics_of
from megamoe_jit.heuristics.select import all_variants


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What a call computes and how, checked."""

    clamp: float  #: as the kernel takes it, infinity for none
    fast_math: bool = True  #: as of `fp8_mega_moe`
    variant: str | None = None  #: the name of one, or None for that of the rule
    num_sms: int | None = None  #: blocks of the launch, None for all SMs
    weights: WeightFormat = FP8

    @classmethod
    def checked(
        cls, clamp: float | None, fast_math: bool, variant: str | None, num_sms: int | None, weights: WeightFormat
    ) -> CallOptions:
        """Those that a caller has given; raises `ConfigError` for a value that is not supported."""
        check_flag("fast_math", fast_math)
        if num_sms is not None:
            check(type(num_sms) is int and num_sms > 0, "num_sms", num_sms, "1 to the SMs of the GPU")
        return cls(check_clamp("activation_clamp", clamp), fast_math, variant, num_sms, weights)


class Experts:
    """The kernel of a node, or of one rank, and its buffer; a collective of the ranks that it spans.

    Args:
        shape: with the experts of the node, or of the rank.
        max_rows: most rows of a launch.
        device: the GPU.
        group: of the node, None for one rank.
        max_pool_rows: as of `get_symm_buffer_for_mega_moe`.
        dtype: of what it gives, bfloat16 or float32.

    Attributes:
        buffer: of the ranks that it spans; made, waited for, checked and destroyed as any `SymmBuffer`.
        rows: its views, which rows arrive in.
    """

    def __init__(
        self,
        shape: MoEShape,
        max_rows: int,
        device: torch.device,
        group: Any,
        max_pool_rows: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.buffer = buffer = SymmBuffer(shape, max_rows, device, group, max_pool_rows)
        self.rows = Rows(buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        self._wide = dtype is torch.float32

    def numerics(self, fast_math: bool) -> Numerics:
        """Those of its kernels."""
        return numerics_of(fast_math, float32_out=self._wide)

    def check_call(self, rows: int, l1: WeightTensors, l2: WeightTensors, options: CallOptions) -> None:
        """Raise `ConfigError` unless such a call can be launched."""
        choice, _ = self.buffer.kernels.choose(rows, options.variant, options.num_sms, options.weights)
        numerics = self.numerics(options.fast_math)
        spec = self.buffer.kernels.spec(choice.variant, numerics, Inputs.STAGED, options.weights)
        check_weights(l1, l2, spec, self.buffer.device)

    def prepare(self, fast_math: bool, weights: WeightFormat, most: int) -> None:
        """Compile, load and bind its kernels of a format; a collective of the ranks that it spans, at first.

        Args:
            fast_math, weights: of the calls to come.
            most: rows of a rank in one of them, which can be more than a launch has where it has a chunk of them.
        """
        limits = {"ranks": self.buffer.ranks, "most": min(most, MAX_TOKENS)}
        for variant in all_variants(self.buffer.shape, weights, **limits):
            self.buffer.prepare(variant, self.numerics(fast_math), weight_format=weights.name)

    def variant_for(self, rows: int, options: CallOptions) -> str:
        """The variant of a call where each rank has so many rows, which all its launches then take."""
        numerics = self.numerics(options.fast_math)
        plan = self.buffer.plan(min(rows, MAX_TOKENS), options.variant, numerics, None, weights=options.weights)
        return str(plan.choice.variant.value)

    def sms_beside(self, comm_ctas: int) -> int:
        """Blocks of a launch that leaves room for so many of another kernel."""
        return max(1, sm_count(self.buffer.device) - comm_ctas)

    def compute(
        self, arrived: Arrived, partial: torch.Tensor, l1: WeightTensors, l2: WeightTensors, options: CallOptions
    ) -> None:
        """Launch on what has arrived.

        Args:
            arrived: into `rows`.
            partial: ``[arrived.rows, hidden]``, written; zeros where no slot of a row is for these experts.
            l1, l2: weights of this rank.
            options: of the call.
        """
        if arrived.num_rows is not None:
            mask_rows(self.rows.topk_idx[: arrived.rows], arrived.num_rows)
        numerics = self.numerics(options.fast_math)
        plan = self.buffer.plan(arrived.rows, options.variant, numerics, options.num_sms, weights=options.weights)
        self.buffer.launch(plan, partial, arrived.rows, l1, l2, None, options.clamp)

    def has_fault(self) -> bool:
        """Whether a kernel has left a record of why it gave up."""
        return bool(self.buffer.fault[0])
