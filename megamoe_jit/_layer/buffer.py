"""`SymmBuffer`: the memory of one rank's layer with the kernels prepared for it.

A buffer is made once per layer shape and serves any token count up to its capacity, any variant, and any weights of
that shape.  It owns the parameter block of each kernel, so a steady-state call writes a few fields and launches.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megamoe_jit._device.fault import decode, fault_error
from megamoe_jit._device.layout import DEFAULT_POOL_ROWS, MAX_SORT_BLOCKS
from megamoe_jit._device.wait import be_ready, wait_for_device
from megamoe_jit._errors import CaptureError, ConfigError, MegaMoeError
from megamoe_jit._layer.group import collectively, gather, group_size, require_equal
from megamoe_jit._layer.memory import LayerMemory
from megamoe_jit._settings.settings import Settings, get_settings
from megamoe_jit._spec import MoEShape, Variant, check_int
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._text import first_line, shown
from megamoe_jit.heuristics.select import all_variants, choose

if TYPE_CHECKING:
    from megamoe_jit._layer.bound_kernel import CallPlan, PreparedKernel
    from megamoe_jit._layer.weights import WeightPair
    from megamoe_jit.heuristics.select import Choice

__all__ = ["SymmBuffer"]

LOG = logging.getLogger("megamoe_jit")
_AFTER_CAPTURE = ", and CUDA waits for no device meanwhile; call this after the capture"
MAX_PLANS = 1024  #: remembered at a time; each is under a kilobyte and made in some 20 us


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def sort_blocks(pairs: int) -> int:
    """Blocks that sort so many (token, slot) pairs at the head of a launch.

    Few at first, one pair for each of a block's 384 threads: a second round costs 0.6 us. Each block also sums what
    all others counted, so beyond 16 there are more only where a block would have more than 2048 pairs.
    """
    return max(1, min(MAX_SORT_BLOCKS, max(min(-(-pairs // 384), 16), -(-pairs // 2048))))


class _Order:
    """The stream of the last launch, after which the next one comes, whatever its stream.

    Of each buffer of one rank. Buffers of several ranks share one on each GPU: two such kernels fill a GPU one after
    the other, and wait for their peers, so on all GPUs they must come in the same order.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None
        self.handle: int | None = None  # compared instead: torch says that no stream differs from None


_orders: dict[int | None, _Order] = {}  #: of buffers of several ranks, by GPU


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
        num_experts: experts of all ranks.
        num_topk: slots of a token.
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
        self._prepared: dict[tuple[Variant, Numerics], PreparedKernel] = {}
        self._plans: dict[tuple[int, str | None, bool | Numerics, int | None], CallPlan] = {}
        self._planned_with: Settings | None = None
        self._order = _Order() if self.ranks == 1 else _orders.setdefault(device.index, _Order())
        self.lock = self._order.lock
        self._used_on: set[int] = set()  # streams that the allocator knows to use this memory
        self._destroyed = False
        self._broken: MegaMoeError | None = None
        be_ready()

    def require_usable(self) -> None:
        """Raise if it was destroyed (`ConfigError`), or a kernel of it has failed (that kernel's error)."""
        if self._destroyed:
            raise ConfigError("this buffer was destroyed; allowed: calls before destroy()")
        if self._broken is not None:
            raise type(self._broken)(f"this buffer is unusable since an earlier call failed: {self._broken}")

    def is_prepared(self, numerics: Numerics | None) -> bool:
        """Whether the kernels of several ranks were prepared, which they are together."""
        return numerics is not None and (Variant.COOPERATIVE, numerics) in self._prepared

    def prepare(self, variant: Variant | str, fast_math: bool | Numerics = True) -> PreparedKernel:
        """Compile, load and bind a kernel now, so that no later call has to (do this before graph capture).

        With several ranks this is a collective the first time: every variant is prepared on every rank, since ranks
        with different token counts may pick different ones, and all agree on the kernels before any is launched.

        Args:
            variant: the name of a `Variant`, or it.
            fast_math: the argument of the calls to come, or all their numeric options.

        Returns:
            The kernel as this buffer launches it.

        Raises:
            ConfigError: there is no such variant, or the buffer was destroyed.
            CaptureError: the current stream is capturing and the kernel is not loaded yet.
            RankMismatchError: the ranks have different kernels.
            MegaMoeError: it could not be compiled or loaded; see `fp8_mega_moe`.
        """
        variant = Variant.parse(variant)
        self.require_usable()
        numerics = fast_math if isinstance(fast_math, Numerics) else Numerics(fast_math)
        prepared = self._prepared.get((variant, numerics))
        if prepared is None:
            if self.ranks > 1 and torch.cuda.is_current_stream_capturing():
                raise CaptureError(
                    "kernels of several ranks are prepared collectively and not while a CUDA graph is being captured; "
                    f"call prepare({variant.value!r}, {numerics}) on every rank before the capture"
                )
            wanted = (variant,) if self.ranks == 1 else tuple(Variant)
            made = collectively(self.group, "preparing the kernels", lambda: self._bind(wanted, numerics))
            if self.ranks > 1:
                keys = {f"kernel {v.value}": kernel.loaded.key for v, kernel in made.items()}
                require_equal(self.group, "their kernels", keys)
            self._prepared.update({(v, numerics): kernel for v, kernel in made.items()})
            prepared = made[variant]
        return prepared

    def prepare_all(self, fast_math: bool | Numerics = True) -> None:
        """Prepare every kernel that some token count can pick: before CUDA graphs of several batch sizes are captured.

        Args:
            fast_math: the argument of the calls to come.

        Raises:
            ConfigError: the buffer was destroyed.
            CaptureError: the current stream is capturing and a kernel is not loaded yet.
            RankMismatchError: the ranks have different kernels.
            MegaMoeError: one could not be compiled or loaded; see `fp8_mega_moe`.
        """
        for variant in all_variants(self.shape):
            self.prepare(variant, fast_math)

    def _bind(self, variants: Iterable[Variant], numerics: Numerics) -> dict[Variant, PreparedKernel]:
        from megamoe_jit._layer.bound_kernel import PreparedKernel

        with torch.cuda.device(self.device):
            return {variant: PreparedKernel(self.spec(variant, numerics), self) for variant in variants}

    def choose(self, tokens: int, variant: str | None, num_sms: int | None) -> tuple[Choice, int]:
        """What such a call takes, and the blocks of its launch; raises `ConfigError` if an option is not supported."""
        sms, settings = sm_count(self.device), get_settings()
        blocks = sms if num_sms is None else num_sms
        if type(blocks) is not int or not 1 <= blocks <= sms:
            raise ConfigError(f"num_sms = {shown(blocks)} is not supported; allowed: 1 to {sms}")
        choice = choose(
            self.shape,
            tokens,
            ranks=self.ranks,
            variant=settings.variant if variant is None else variant,
            cooperative_threshold=settings.cooperative_threshold,
            num_sms=blocks,
            gpu=torch.cuda.get_device_name(self.device),
        )
        return choice, blocks

    def plan(self, tokens: int, variant: str | None, fast_math: bool | Numerics, num_sms: int | None) -> CallPlan:
        """What a call launches; remembered for each combination, so a steady-state call only looks it up."""
        settings = get_settings()
        if settings is not self._planned_with:
            self._plans.clear()
            self._planned_with = settings
        key = (tokens, variant, fast_math, num_sms)
        try:
            plan = self._plans.get(key)
        except TypeError:  # costs nothing where they are what they should be
            given = f"variant = {shown(variant)}, fast_math = {shown(fast_math)}, num_sms = {shown(num_sms)}"
            raise ConfigError(f"{given}; allowed: a name or None, a bool, a number or None") from None
        if plan is None:
            from megamoe_jit._layer.bound_kernel import CallPlan

            choice, blocks = self.choose(tokens, variant, num_sms)
            kernel = self.prepare(choice.variant, fast_math)
            two_sides = kernel.knows_sides and blocks == sm_count(self.device)  # else they fall unevenly on the sides
            plan = CallPlan(kernel, choice, blocks, min(blocks, sort_blocks(tokens * self.num_topk)), two_sides)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def launch(
        self,
        plan: CallPlan,
        *,
        y: torch.Tensor,
        tokens: int,
        l1: WeightPair,
        l2: WeightPair,
        stats: torch.Tensor | None,
        clamp: float,
    ) -> None:
        """Launch on the current stream; the arguments are already checked.

        Two launches on one buffer must not overlap: when the stream changes, the new one waits for the old one.
        """
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                self.launch(plan, y=y, tokens=tokens, l1=l1, l2=l2, stats=stats, clamp=clamp)
            return
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        with self.lock:
            if self._destroyed:  # meanwhile, by another thread
                self.require_usable()
            if stream != self._order.handle or stream not in self._used_on:
                self._order_after_last(torch.cuda.current_stream(self.device))
            plan.kernel.set_weights(l1, l2)
            params = plan.kernel.params
            params.y = y.data_ptr()
            params.stats = 0 if stats is None else stats.data_ptr()
            params.tokens = tokens
            params.clamp = clamp
            params.lag_tiles, params.item_shift = plan.choice.lag_tiles, plan.choice.rows_per_item.bit_length() - 1
            params.sort_blocks, params.want_sides = plan.sort_blocks, plan.two_sides
            plan.kernel.launcher.launch(plan.num_sms, stream)

    def wait_for_last(self) -> None:
        """Make the current stream wait for the last call, if that was on another: before inputs are staged there.

        A call orders itself after the last one, but not what was staged before it: that would change the inputs of a
        kernel that is still running on the other stream.
        """
        with torch.cuda.device(self.device), self.lock:
            stream = torch.cuda.current_stream(self.device)
            if stream.cuda_stream != self._order.handle:
                self._order_after_last(stream)

    def _order_after_last(self, stream: torch.cuda.Stream) -> None:
        """Make `stream` wait for the stream of the last launch, and the memory's reuse for both.

        Not while a graph is being captured: its replays are for the caller to order with other calls on the buffer.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        order = self._order
        if order.stream is not None and stream.cuda_stream != order.handle:
            stream.wait_stream(order.stream)
        self.local.record_stream(stream)
        if self.ranks == 1:  # else it is symmetric memory, which torch's allocator does not reuse
            self.buffer.record_stream(stream)
        self._used_on.add(stream.cuda_stream)
        order.stream, order.handle = stream, stream.cuda_stream

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
            self._broken = fault_error(fault, self.rank, cause)
            self._plans.clear()
            raise self._broken

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
        self._prepared.clear()
        self._plans.clear()
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
