"""`MultiNodeBuffer`: the memory of one rank's layer over several nodes, and a call in its three parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial as partial_call
from typing import Any, NoReturn, TypeVar

import torch

from megamoe_jit._device.capture import is_capturing, refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.checks import check_expert_ids, check_tensor
from megamoe_jit._layer.given_weights import WeightTensors, format_of_call
from megamoe_jit._layer.group import collectively, require_equal
from megamoe_jit._layer.raw_inputs import RawInputs, check_rows
from megamoe_jit._layer.stage_kernel import Outputs, launch_stage
from megamoe_jit._nodes.exchange import Arrived, Batch, Exchange
from megamoe_jit._nodes.experts import CallOptions
from megamoe_jit._nodes.memory import Dispatched, MultiNodeMemory
from megamoe_jit._nodes.overlap import overlapped
from megamoe_jit._nodes.watch import RailLost
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec import FP8, WeightFormat, check_flag
from megamoe_jit._text import first_line

T = TypeVar("T")
_FIRST = "checking the arguments of the first call"


class MultiNodeBuffer(MultiNodeMemory):
    """A layer's memory on one rank of several nodes; `get_multinode_buffer_for_mega_moe` makes one.

    Stage a batch into the first T rows of the views, or by `stage`, before each call. Rows past T never matter. Threads
    that share it take turns themselves. At the end of a `with` it is destroyed.

    Attributes:
        x, x_sf, topk_idx, topk_weights: views as those of a `SymmBuffer`, of this rank's tokens. Ids count all ranks'
            experts.
        num_max_tokens_per_rank: capacity in tokens.
        num_experts, num_topk, hidden, intermediate_hidden: sizes of the layer.
        topology: the `NodeTopology`.
        chunks: parts that a call is cut into, at most, so that one's rows travel while another is computed.
        device: the GPU.
        lock: of staging and calls together, for threads that share the buffer.
    """

    def stage(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        x_scales: torch.Tensor | None = None,
        routed_scaling_factor: float = 1.0,
        padded_tokens: int | None = None,
    ) -> int:
        """Quantise a batch into the views, as `stage` of the package does for a `SymmBuffer`.

        Args:
            x, topk_idx, topk_weights, x_scales, routed_scaling_factor: as there.
            padded_tokens: rows of the call to come, on all ranks alike; those past T are masked at once.

        Returns:
            T, the number of tokens.

        Raises:
            MegaMoeError: as there.
        """
        self.require_usable()
        more = (self.hidden, self.num_topk, self.device, x_scales, routed_scaling_factor)
        raw = RawInputs(x, topk_idx, topk_weights, *more)
        rows = raw.tokens if padded_tokens is None else padded_tokens
        check_rows("padded_tokens", rows, raw.tokens, self.num_max_tokens_per_rank)
        if self._alone:
            self._experts.buffer.wait_for_last()
        launch_stage(raw, Outputs(*self._staged.tensors), rows)
        return raw.tokens

    def prepare(self, fast_math: bool = True, *, weight_format: str = FP8.name) -> None:
        """Compile, load and bind every kernel, and connect the nodes: before a graph is captured; a collective.

        Args:
            fast_math: of the calls to come.
            weight_format: of their weights: "fp8", "mxfp4" or "fp8e5m2".

        Raises:
            MegaMoeError: as `SymmBuffer.prepare`; on every rank.
        """
        check_flag("fast_math", fast_math)
        weights = WeightFormat.parse(weight_format)
        self.require_usable()
        if (fast_math, weights) in self._prepared:
            return
        refuse_capture("kernels and connections cannot be made", "call prepare() on every rank before the capture")
        for experts in self._all_experts():
            action = partial_call(experts.prepare, fast_math, weights, self.num_max_tokens_per_rank)
            collectively(self.topology.group, "preparing the kernels", action)
        if not self._alone:
            passes = partial_call(self.choices.prepare, self.device)
            collectively(self.topology.group, "preparing the passes over rows", passes)
            self._exchanging("connections", lambda: self.choices.connect(self.device))
        self._prepared.add((fast_math, weights))

    def dispatch(self, tokens: int, padded_tokens: int | None = None) -> Dispatched:
        """Bring the rows that are staged to the nodes that have their experts, on the current stream.

        Args:
            tokens: T, those of this rank, 0 to `padded_tokens`.
            padded_tokens: rows of each rank in this call, the same on all; the capacity by default.

        Returns:
            What `compute` takes next.

        Raises:
            ConfigError: a number is not supported, or what was dispatched before was not computed.
            PeerTimeoutError: a rank is lost.
        """
        rows = self._admit_rows(tokens, padded_tokens)
        if self._alone:
            raise ConfigError("dispatch on one node; allowed: fp8_mega_moe_multinode, nothing travels between nodes")
        self._begin(tokens, rows)
        return self._dispatch(0, rows, tokens, self.choices.pick(rows, self._capturing()))

    def compute(
        self,
        dispatched: Dispatched,
        l1: WeightTensors,
        l2: WeightTensors,
        *,
        activation_clamp: float | None = None,
        fast_math: bool = True,
        variant: str | None = None,
        num_sms: int | None = None,
    ) -> None:
        """Run this node's experts on what has arrived, in one launch on the current stream.

        Args:
            dispatched: as `dispatch` gave it.
            l1, l2, activation_clamp, fast_math, variant, num_sms: as `fp8_mega_moe` takes them. Where rows travel
                meanwhile, `num_sms` and the buffer's `comm_ctas` together are at most the GPU's SMs.

        Raises:
            MegaMoeError: as `fp8_mega_moe`.
        """
        self.require_usable()
        options = CallOptions.checked(activation_clamp, fast_math, variant, num_sms, format_of_call(l1))
        self.prepare(fast_math, weight_format=options.weights.name)
        variant = self._experts.variant_for(len(dispatched.arrived.batch.rows), options)
        self._compute(dispatched, l1, l2, replace(options, variant=variant))

    def combine(self, dispatched: Dispatched, y: torch.Tensor) -> None:
        """Bring results back and sum them, on the current stream.

        Args:
            dispatched: after `compute`.
            y: bf16 ``[T, hidden]``, written.

        Raises:
            ConfigError: `y` does not fit, or nothing was computed.
            PeerTimeoutError: a rank is lost.
        """
        self.require_usable()
        if dispatched.lane.busy:
            raise ConfigError("combine before compute; allowed: dispatch, compute, combine, in this order")
        check_tensor("y", y, torch.bfloat16, (dispatched.arrived.batch.tokens, self.hidden), self.device)
        self._combine(dispatched, y)

    def run(
        self,
        y: torch.Tensor,
        l1: WeightTensors,
        l2: WeightTensors,
        padded_tokens: int | None,
        fast_math: bool,
        admit: Callable[[], CallOptions],
    ) -> None:
        """A whole call: what `fp8_mega_moe_multinode` does, but for what `admit` checks, all but rows and weights."""
        with self.lock:
            self.require_usable()
            if self._is_first(fast_math, l1):
                self._prepare_first(y, l1, l2, padded_tokens, admit)
            options, tokens = admit(), y.shape[0]
            rows = self._admit_rows(tokens, padded_tokens)
            if self._alone:
                self._begin(tokens, tokens)
                batch = Batch(self._staged[:tokens], tokens)
                self._experts.compute(Arrived(tokens, None, batch), y, l1, l2, options)
            else:
                self._begin(tokens, rows)
                self.wait_for_last()
                self._run_across(y, rows, l1, l2, options)

    def _is_first(self, fast_math: bool, l1: WeightTensors) -> bool:
        """Whether the other ranks come to check their arguments and to prepare kernels together."""
        try:
            check_flag("fast_math", fast_math)
            return (fast_math, format_of_call(l1)) not in self._prepared
        except ConfigError:  # refused, but together with the others only if these have prepared nothing yet
            return not self._prepared

    def refuse(self, error: ConfigError, fast_math: bool, l1: WeightTensors) -> NoReturn:
        """Raise what is wrong with a call before `run`; on all ranks where these come to check their arguments."""

        def check() -> NoReturn:
            raise error

        if self._is_first(fast_math, l1) and not self._capturing():
            collectively(self.topology.group, _FIRST, check)
        raise error

    def _prepare_first(
        self,
        y: torch.Tensor,
        l1: WeightTensors,
        l2: WeightTensors,
        padded_tokens: int | None,
        admit: Callable[[], CallOptions],
    ) -> None:
        """What comes before a first call: what one rank refuses is refused on all."""

        def check() -> CallOptions:
            options = admit()
            self._experts.check_call(self._admit_rows(y.shape[0], padded_tokens), l1, l2, options)
            return options

        refuse_capture("kernels and connections cannot be made", "call prepare() on every rank before the capture")
        options = collectively(self.topology.group, _FIRST, check)
        self.prepare(options.fast_math, weight_format=options.weights.name)

    def _run_across(
        self, y: torch.Tensor, rows: int, l1: WeightTensors, l2: WeightTensors, options: CallOptions
    ) -> None:
        """Bring rows to their experts, run these, and bring results back: at once, or chunk by chunk."""
        tokens = y.shape[0]
        # by the rows of a rank: as many pairs of token and slot are for its experts, in whatever form they come
        options = replace(options, variant=self._experts.variant_for(rows, options))
        capturing = self._capturing()
        exchange = self.choices.pick(rows, capturing)
        chunks = self.choices.chunks(rows, capturing, self.chunks, self._step)
        if chunks == 1:
            one = self._dispatch(0, rows, tokens, exchange)
            self._compute(one, l1, l2, options)
            self._combine(one, y)
            return
        sms = options.num_sms or self._experts.sms_beside(self.comm_ctas)
        options = replace(options, num_sms=sms)
        step = -(-rows // chunks)
        parts = [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
        under_way: dict[int, Dispatched] = {}

        def bring(i: int) -> None:
            begin, end = parts[i]
            under_way[i] = self._dispatch(begin, end, min(tokens, end), exchange)

        def launch(i: int) -> None:
            self._compute(under_way[i], l1, l2, options)

        def finish(i: int) -> None:
            begin, end = parts[i]
            self._combine(under_way.pop(i), y[min(begin, tokens) : min(end, tokens)])

        overlapped(len(parts), bring, launch, finish, self._comm_stream())

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and is_capturing()

    def _comm_stream(self) -> Any:
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _admit_rows(self, tokens: int, padded_tokens: int | None) -> int:
        self.require_usable()
        most = self.num_max_tokens_per_rank
        rows = most if padded_tokens is None else padded_tokens
        check_rows("padded_tokens", rows, 1, most)
        check_rows("tokens", tokens, 0, rows)
        return rows

    def _begin(self, tokens: int, rows: int) -> None:
        """Note the call, mask rows past the tokens, and in debug mode look whether all ranks mean the same call."""
        self.topology.roll_call.calls += 1
        if rows > tokens:
            self.topk_idx[tokens:rows].fill_(-1)
        if get_settings().debug and not self._capturing():
            require_equal(self.topology.group, "the rows of a call", {"padded_tokens": rows if not self._alone else 0})
            check_expert_ids(self.topk_idx[:tokens], self.num_experts)

    def _dispatch(self, begin: int, end: int, tokens_end: int, exchange: Exchange) -> Dispatched:
        lane = self._lanes[self._next]
        if lane.busy:
            raise ConfigError("dispatch before what was dispatched last was computed; allowed: compute it first")
        self._next = (self._next + 1) % len(self._lanes)
        batch = Batch(self._staged[begin:end], max(0, tokens_end - begin))
        what = lambda: exchange.dispatch(batch, lane.experts.rows, self.first_expert, self.local_experts)  # noqa: E731
        arrived = self._exchanging("rows", what)
        lane.busy = True
        return Dispatched(exchange, arrived, lane)

    def _compute(self, dispatched: Dispatched, l1: WeightTensors, l2: WeightTensors, options: CallOptions) -> None:
        lane, arrived = dispatched.lane, dispatched.arrived
        lane.experts.compute(arrived, lane.partial[: arrived.rows], l1, l2, options)
        lane.busy = False

    def _combine(self, dispatched: Dispatched, y: torch.Tensor) -> None:
        partial = dispatched.lane.partial[: dispatched.arrived.rows]
        self._exchanging("results", lambda: dispatched.exchange.combine(dispatched.arrived, partial, y))

    def _exchanging(self, what: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if any(experts.has_fault() for experts in self._all_experts()):
                self.check()  # a kernel gave up before, and says why
            if isinstance(error, RailLost):
                raise self._lost(str(error), error.missing) from error
            said = re.sub(r"^\[[^\]]*\] *", "", first_line(error))  # without the place in the sources of a library
            raise self._lost(f"{what} did not get through: {said}") from error
