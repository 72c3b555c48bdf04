"""`SymmBuffer`: the memory of one rank's layer with the kernels and the order of launches that belong to it.

A buffer is made once per layer shape and serves any token count up to its capacity, any variant, and any weights of
that shape.  This is what callers see of it, and its life from the first call to `destroy`; its parts are `LayerMemory`,
`KernelSet` and `StreamOrder`.
"""

from __future__ import annotations

import ctypes
import logging
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megamoe_jit._device.fault import decode, fault_error
from megamoe_jit._device.layout import DEFAULT_POOL_ROWS
from megamoe_jit._device.wait import be_ready, wait_for_device
from megamoe_jit._errors import CaptureError, ConfigError, MegaMoeError
from megamoe_jit._layer.bound_kernel import BoundKernel, CallPlan
from megamoe_jit._layer.group import collectively, gather, group_size
from megamoe_jit._layer.kernel_set import KernelSet
from megamoe_jit._layer.memory import LayerMemory
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._layer.stage_kernel import Outputs, launch_stage, stage_kernel
from megamoe_jit._layer.steady import SteadyCalls
from megamoe_jit._layer.stream_order import StreamOrder
from megamoe_jit._spec import FP8, MoEShape, Numerics, Variant, WeightFormat, check_int
from megamoe_jit._spec.any_layer import StageFormat
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._text import first_line, shown
from megamoe_jit.heuristics.select import all_variants

if TYPE_CHECKING:
    from megamoe_jit._layer.given_weights import WeightTensors

LOG = logging.getLogger("megamoe_jit")
_AFTER_CAPTURE = ", and CUDA waits for no device meanwhile; call this after the capture"


class SymmBuffer(LayerMemory):
    """A layer's memory on one rank, and the kernels that run in it; `get_symm_buffer_for_mega_moe` makes one.

    Stage inputs into the first T rows of the views before each call.  Rows past T never matter.  At the end of a `with`
    it is destroyed.

    Attributes:
        x: e4m3 ``[capacity, hidden]``, input codes.
        x_sf: float32 ``[capacity, hidden / 128]``, their scales.
        topk_idx: int64 ``[capacity, topk]``, expert of each slot, -1 for none.
        topk_weights: float32 ``[capacity, topk]``, router weight of each slot.
        buffer: the symmetric memory that holds these views, uint8.
        handle: has ``buffer_ptrs``, the address of every rank's symmetric memory.
        num_max_tokens_per_rank: capacity in tokens, rounded up to a multiple of 128.
        num_experts: experts of all ranks that the router chooses from.
        num_topk: slots of a token that the router fills.
        num_shared_experts: experts of each rank that all its tokens go to beside; they have no slots in the views.
        hidden: columns of a token.
        intermediate_hidden: columns between the two products.
        group: the process group that was given.
        rank: this process's rank in it.
        ranks: how many share the experts.
        device: the GPU that all of this is on.
        lock: of staging and calls together, for threads that share the buffer.
    """

    def __init__(
        self,
        shape: MoEShape,
        max_tokens: int,
        device: torch.device,
        group: Any = None,
        max_pool_rows: int = DEFAULT_POOL_ROWS,
    ) -> None:
        if not isinstance(shape, MoEShape) or not isinstance(device, torch.device):
            given = f"shape = {shown(shape)}, device = {shown(device)}"
            raise ConfigError(f"{given}; allowed: a MoEShape and a torch.device, as get_symm_buffer_for_mega_moe gives")
        group_size(group)  # raises if it is no group
        check_int("max_tokens", max_tokens)
        check_int("max_pool_rows", max_pool_rows)
        super().__init__(shape, max_tokens, device, group, max_pool_rows)
        self.kernels = KernelSet(self.place, group, lambda: self.order.forget())
        self.steady = SteadyCalls(self.hidden, device)
        self.order = StreamOrder(device, shared=self.ranks > 1)
        self.lock = self.order.lock
        self._outputs = Outputs(self.x, self.x_sf, self.topk_idx, self.topk_weights)
        self._index = device.index
        self._destroyed = False
        self._broken: MegaMoeError | None = None
        be_ready()

    def require_usable(self) -> None:
        """Raise if it was destroyed (`ConfigError`), or a kernel of it has failed (that kernel's error)."""
        if self._destroyed:
            raise ConfigError("this buffer was destroyed; allowed: calls before destroy()")
        if self._broken is not None:
            raise type(self._broken)(f"this buffer is unusable since an earlier call failed: {self._broken}")

    def prepare(
        self,
        variant: Variant | str,
        fast_math: bool | Numerics = True,
        *,
        raw: bool = False,
        weight_format: str = FP8.name,
    ) -> BoundKernel:
        """Compile, load and bind a kernel now, so that no later call has to (do this before graph capture).

        With several ranks this is a collective the first time: every variant is prepared on every rank, since ranks
        with different token counts may pick different ones, and all agree on the kernels before any is launched.

        Args:
            variant: the name of a `Variant`, or it.
            fast_math: the argument of the calls to come, or all their numeric options.
            raw: the kernel that stages bf16 inputs itself, as `MegaMoE` launches it.
            weight_format: of the weights of the calls to come: "fp8", "mxfp4" or "fp8e5m2".

        Returns:
            The kernel as this buffer launches it.

        Raises:
            ConfigError: there is no such variant or format, or not both together, or the buffer was destroyed.
            CaptureError: the current stream is capturing and the kernel is not loaded yet.
            RankMismatchError: the ranks have different kernels.
            MegaMoeError: it could not be compiled or loaded; see `fp8_mega_moe`.
        """
        variant, weights = Variant.parse(variant), WeightFormat.parse(weight_format)
        self.require_usable()
        numerics = fast_math if isinstance(fast_math, Numerics) else Numerics(fast_math)
        return self.kernels.prepare(variant, numerics, Inputs.RAW if raw else Inputs.STAGED, weights)

    def prepare_all(self, fast_math: bool | Numerics = True, *, weight_format: str = FP8.name) -> None:
        """Prepare every kernel that some token count can pick: before CUDA graphs of several batch sizes are captured.

        Args:
            fast_math: the argument of the calls to come.
            weight_format: of their weights: "fp8", "mxfp4" or "fp8e5m2".

        Raises:
            ConfigError: the buffer was destroyed, or there is no such format.
            CaptureError: the current stream is capturing and a kernel is not loaded yet.
            RankMismatchError: the ranks have different kernels.
            MegaMoeError: one could not be compiled or loaded; see `fp8_mega_moe`.
        """
        limits = {"ranks": self.ranks, "most": self.num_max_tokens_per_rank}
        for variant in all_variants(self.shape, WeightFormat.parse(weight_format), **limits):
            for raw in (False, True):
                self.prepare(variant, fast_math, raw=raw, weight_format=weight_format)

        def load() -> None:
            for form in StageFormat:
                stage_kernel(form, self.device)

        collectively(self.group, "preparing the staging kernels", load)

    def plan(
        self,
        tokens: int,
        variant: str | None,
        fast_math: bool | Numerics,
        num_sms: int | None,
        inputs: Inputs = Inputs.STAGED,
        weights: WeightFormat = FP8,
    ) -> CallPlan:
        """What a call launches; remembered for each combination, so a steady-state call only looks it up."""
        asked = (tokens, variant, fast_math, num_sms, inputs, weights)
        plan = self.kernels.known_plan(asked)
        if plan is None:
            self.require_usable()
            plan = self.kernels.new_plan(asked)
        return plan

    def read_inputs(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        x_scales: torch.Tensor | None = None,
        weight_factor: float = 1.0,
    ) -> RawInputs:
        """A batch, checked, for which there is room; raises `ConfigError` if it is none of this layer."""
        raw = RawInputs(x, topk_idx, topk_weights, self.hidden, self.num_topk, self.device, x_scales, weight_factor)
        if raw.tokens > self.num_max_tokens_per_rank:
            raise ConfigError(
                f"x has {raw.tokens} tokens; allowed: at most {self.num_max_tokens_per_rank}, the layer's max_tokens"
            )
        return raw

    def stage_inputs(self, raw: RawInputs, rows: int) -> None:
        """Enqueue the staging of a batch after the last call, with ids and weights masked up to `rows`."""
        with self.lock:
            self.require_usable()
            self.wait_for_last()
            launch_stage(raw, self._outputs, rows)

    def launch(
        self,
        plan: CallPlan,
        y: torch.Tensor,
        tokens: int,
        l1: WeightTensors,
        l2: WeightTensors,
        stats: torch.Tensor | None,
        clamp: float,
        raw: RawInputs | None = None,
        shared_weight: float = 1.0,
    ) -> None:
        """Launch on the current stream; all arguments but the weights are already checked.

        Two launches on one buffer must not overlap: when the stream changes, the new one waits for the old one.
        """
        index = self._index
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(self.device):
                self.launch(plan, y, tokens, l1, l2, stats, clamp, raw, shared_weight)
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        with self.lock:
            if self._destroyed or self._broken is not None:  # meanwhile, by another thread
                self.require_usable()
            kernel = plan.kernel
            kernel.use_weights(l1, l2)
            if not self.order.is_next(stream):
                self.order.enter(self._reusable())
            kernel.launch(plan, stream, y, tokens, stats, clamp, raw, shared_weight)

    def _reusable(self) -> tuple[torch.Tensor, ...]:
        """Memory that torch's allocator may give away again; symmetric memory it does not."""
        own = (self.local, self.buffer) if self.ranks == 1 else (self.local,)
        expanded = self.kernels.expanded
        return own if expanded is None else (*own, expanded.memory)

    def wait_for_last(self) -> None:
        """Make the current stream wait for the last call, if that was on another: before inputs are staged there.

        A call orders itself after the last one, but not what was staged before it: that would change the inputs of a
        kernel that is still running on the other stream.
        """
        index = self._index
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(self.device):
                self.wait_for_last()
        elif not self.order.is_next(torch._C._cuda_getCurrentRawStream(index)):
            with self.lock:
                self.order.enter(self._reusable())

    def check(self) -> None:
        """Wait for the device and raise if a kernel of this buffer gave up.

        Raises:
            DeviceFaultError: a wait inside a kernel passed its deadline, or the CUDA context is broken.
            PeerTimeoutError: the same, and it waited for other ranks.
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing is wrong.
        """
        try:
            capturing, cause = torch.cuda.is_current_stream_capturing(), None
        except RuntimeError as error:  # the context is broken already
            capturing, cause = False, first_line(error)
        if capturing:
            raise CaptureError(f"the current stream is capturing{_AFTER_CAPTURE}")
        if cause is None:
            cause = wait_for_device(self.device, lambda: bool(self.fault[0]))
        if cause is not None and "captur" in cause.lower():  # a stream of another thread
            raise CaptureError(f"a stream is capturing{_AFTER_CAPTURE}: {cause}")
        fault = decode(self.fault.tolist())
        if fault is not None or cause is not None:
            broken = fault_error(fault, self.rank, cause)
            self.poison(broken)
            raise broken

    def poison(self, error: MegaMoeError) -> None:
        """Have later calls raise this error of another part of the call, and `destroy` wait for nobody."""
        self._broken = error
        self.kernels.forget_plans()
        self.steady.forget()

    def destroy(self) -> None:
        """Wait for the device and give the memory back; safe to call twice.

        With several ranks this is a collective, so that no rank frees memory that another still reads; after a failed
        call it is local and never waits.  A failure that nobody has asked for yet is warned about, not raised.

        Raises:
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing was given back.
        """
        with self.lock:  # another thread's launch comes before this, or not at all
            if self._destroyed:
                return
            self._destroyed = True
        news = ""
        if self._broken is None:
            try:
                self.check()  # a launch on another stream may still use the memory
                gather(self.group, None)
            except CaptureError:
                self._destroyed = False
                raise
            except MegaMoeError as error:
                news = f"while a SymmBuffer was destroyed: {error}"
        if self._broken is not None and self.ranks > 1:
            # torch frees symmetric memory by a call that aborts the process on a broken context: keep it
            for kept in (self.buffer, self.handle):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        self.kernels.clear()
        self.steady.forget()
        self.handle = SimpleNamespace(buffer_ptrs=[])
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.buffer = self.local = self.x = self.x_sf = self.topk_idx = self.topk_weights = empty
        if news:
            warnings.warn(news, RuntimeWarning, stacklevel=2)

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a SymmBuffer is memory that its process and its peers know by address, and cannot be copied or sent; "
            "allowed: get_symm_buffer_for_mega_moe(...) where another one is needed"
        )

    def __del__(self) -> None:
        if not getattr(self, "_destroyed", True) and self.ranks > 1:
            warnings.warn(
                "a SymmBuffer of several ranks was dropped without destroy(); its symmetric memory is lost",
                ResourceWarning,
                stacklevel=2,
            )

    def __enter__(self) -> SymmBuffer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.ranks > 1:  # the others may come late, or never, and this process be ended first
            LOG.error(
                "rank %d leaves its SymmBuffer, and waits for the other ranks, because of %s: %s",
                self.rank,
                type(error).__name__,
                error,
            )
        self.destroy()
