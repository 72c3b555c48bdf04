"""The memory of one rank's layer over several nodes, and its life: usable, lost, destroyed.

What one chunk of a call works in is a lane. One is enough where chunks follow each other, two where they overlap.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from functools import partial as partial_call
from typing import Any, Self

import torch

from megamoe_jit._device.capture import is_capturing
from megamoe_jit._device.layout import DEFAULT_POOL_ROWS
from megamoe_jit._device.wait import wait_for_device
from megamoe_jit._errors import CaptureError, ConfigError, MegaMoeError, PeerTimeoutError
from megamoe_jit._layer.group import collectively
from megamoe_jit._nodes.choice import Choices
from megamoe_jit._nodes.exchange import Arrived, Exchange, Rows
from megamoe_jit._nodes.experts import Experts
from megamoe_jit._nodes.model import CTAS_BESIDE, check_launch_rows
from megamoe_jit._nodes.ranks import NodeRanks
from megamoe_jit._nodes.watch import UNASKED, Watch
from megamoe_jit._spec import BLOCK, MoEShape, WeightFormat

ABORT_S = 3.0  #: for NCCL to end what is under way, after a loss


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A batch under way: what `MultiNodeBuffer.dispatch` gives, and `compute` and `combine` take, in that order.

    Attributes:
        exchange: how its rows have come.
        arrived: what they are.
        lane: in which of the buffer's memories.
    """

    exchange: Exchange
    arrived: Arrived
    lane: Lane


class Lane:
    """Memory of one chunk under way: the experts, in whose buffer rows arrive, and what they give."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self.experts = experts
        rows, hidden = experts.rows.x.shape
        with torch.inference_mode(False):
            self.partial = torch.empty(rows, hidden, dtype=dtype, device=experts.rows.x.device)
        self.busy = False  #: a batch has arrived, and was not computed yet


class MultiNodeMemory:
    """What a layer over several nodes has on one rank: memory, experts, and a life that ends with the first loss."""

    def __init__(
        self,
        topology: NodeRanks,
        shape: MoEShape,
        max_tokens: int,
        device: torch.device,
        choices: Choices,
        *,
        partial: torch.dtype = torch.bfloat16,
        chunks: int = 1,
        comm_ctas: int = CTAS_BESIDE,
        timeout_s: float = 60.0,
        max_pool_rows: int = DEFAULT_POOL_ROWS,
    ) -> None:
        self.topology, self.shape, self.device = topology, shape, device
        self.num_experts, self.num_topk, self.num_shared_experts = shape.experts, shape.topk, shape.shared
        self.hidden, self.intermediate_hidden = shape.hidden, shape.intermediate
        self.chunks, self.comm_ctas, self.timeout_s = chunks, comm_ctas, timeout_s
        self.choices = choices
        self.lock = threading.RLock()
        self._destroyed = False
        self._broken: MegaMoeError | None = None
        self._prepared: set[tuple[bool, WeightFormat]] = set()
        self._stream: Any = None
        whole = choices.whole_node
        parts = topology.nodes if whole else topology.world_size
        self.local_experts = shape.experts // parts
        self.first_expert = self.local_experts * (topology.node if whole else topology.rank)
        self._alone = topology.nodes == 1 and whole
        inner = MoEShape(shape.hidden, shape.intermediate, self.local_experts, shape.topk, shape.shared)
        group = topology.node_group if whole else None
        self._step = -(-max_tokens // chunks)
        rows = max_tokens if self._alone else choices.most_rows(self._step)
        admit = partial_call(check_launch_rows, rows, max_tokens, topology.nodes, chunks)
        collectively(topology.group, "checking the rows of a launch", admit)
        lanes = 1 if self._alone or chunks == 1 else 2
        dtype = torch.bfloat16 if self._alone else partial
        made = [Experts(inner, rows, device, group, max_pool_rows, dtype) for _ in range(lanes)]
        self._experts = made[0]
        if self._alone:  # the node's buffer is the caller's: nothing comes between
            self._lanes: list[Lane] = []
            self.num_max_tokens_per_rank = len(made[0].rows)
            self._staged = made[0].rows
        else:
            self._lanes = [Lane(experts, partial) for experts in made]
            self.num_max_tokens_per_rank = max_tokens
            self._staged = staging(shape, max_tokens, device)
        self.x, self.x_sf, self.topk_idx, self.topk_weights = self._staged.tensors
        self._next = 0

    def require_usable(self) -> None:
        """Raise if it was destroyed (`ConfigError`), or a call of it has failed (that call's error)."""
        if self._destroyed:
            raise ConfigError("this buffer was destroyed; allowed: calls before destroy()")
        if self._broken is not None:
            raise type(self._broken)(f"this buffer is unusable since an earlier call failed: {self._broken}")

    def wait_for_last(self) -> None:
        """Make the current stream wait for the last call, if that was on another."""
        for experts in self._all_experts():
            experts.buffer.wait_for_last()

    def _all_experts(self) -> list[Experts]:
        return [lane.experts for lane in self._lanes] or [self._experts]

    def _lost(self, said: str, missing: dict[int, str] | None = UNASKED) -> PeerTimeoutError:
        """The error of a call that did not get through, which names who is missing; the buffer is unusable then.

        Args:
            said: what was noticed.
            missing: as `RollCall.missing` gave it, where that was asked already; else it is, for a few seconds.
        """
        topology = self.topology
        roll_call, place_of = topology.roll_call, topology.place_of
        roll_call.give_notice()
        if missing is UNASKED:
            missing = roll_call.missing()
        if missing is None:
            who = "nobody can be asked: the store of the process group is gone, and with it the process that kept it"
        elif missing:
            who = "missing: " + ", ".join(f"{place_of(rank)}: {why}" for rank, why in missing.items())
        else:
            who = "every rank is there: look at the network between the nodes"
        error = PeerTimeoutError(
            f"{place_of(topology.rank)}: in call {roll_call.calls} between nodes, {said} ({who}). "
            "This buffer is unusable, restart the processes"
        )
        self._poison(error)
        return error

    def _poison(self, error: MegaMoeError) -> None:
        self._broken = error
        for experts in self._all_experts():
            experts.buffer.poison(error)
        ending = threading.Thread(target=self.choices.abort, args=(self.device,), daemon=True)
        ending.start()
        ending.join(ABORT_S)

    def check(self) -> None:
        """Wait for the device, at most as long as the deadlines say, and raise if a call of this buffer failed.

        Raises:
            PeerTimeoutError: a rank is lost; says which, and its node.
            DeviceFaultError: a wait inside a kernel passed its deadline, or the CUDA context is broken.
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing is wrong.
        """
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))
        if self.device.type != "cuda":
            return
        faults = any(experts.has_fault() for experts in self._all_experts())
        if not self._alone and not faults and not is_capturing():
            error = partial_call(self.choices.error, self.device)
            watch = Watch(self.topology.roll_call.missing, error, self.timeout_s)
            wait_for_device(self.device, self._experts.has_fault, watch)
            if watch.said is not None:
                raise self._lost(watch.said, watch.missing)
        for experts in self._all_experts():
            try:
                experts.buffer.check()
            except MegaMoeError as error:
                if not isinstance(error, CaptureError):
                    self._broken = error
                raise

    def destroy(self) -> None:
        """Wait for the device and give the memory back; safe to call twice; a collective unless a rank is lost.

        A failure that nobody has asked for yet is warned about, not raised.

        Raises:
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing was given back.
        """
        if self._destroyed:
            return
        news = self._broken is None
        try:
            self.check()
        except CaptureError:
            raise
        except MegaMoeError as error:
            if news:
                warnings.warn(f"while a MultiNodeBuffer was destroyed: {error}", RuntimeWarning, stacklevel=2)
        self._destroyed = True
        for experts in self._all_experts():
            experts.buffer.destroy()
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.x = self.x_sf = self.topk_idx = self.topk_weights = empty
        self._staged = Rows(empty, empty, empty, empty)
        self._lanes = []

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a MultiNodeBuffer is memory that its process and its peers know by address, and cannot be copied or sent; "
            "allowed: get_multinode_buffer_for_mega_moe(...) where another one is needed"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


def staging(shape: MoEShape, rows: int, device: torch.device) -> Rows:
    """Memory for the tokens of one rank, all masked."""
    with torch.inference_mode(False):
        return Rows(
            torch.zeros(rows, shape.hidden, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            torch.zeros(rows, shape.hidden // BLOCK, dtype=torch.float32, device=device),
            torch.full((rows, shape.topk), -1, dtype=torch.int64, device=device),
            torch.zeros(rows, shape.topk, dtype=torch.float32, device=device),
        )
