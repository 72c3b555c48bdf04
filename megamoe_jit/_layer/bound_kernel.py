"""`BoundKernel`: one loaded kernel, and the parameters by which calls reach it, which it alone writes."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch

from megamoe_jit._device.l2_partition import sides_of_sms
from megamoe_jit._device.launch import Launcher
from megamoe_jit._device.load import load_kernel
from megamoe_jit._device.params import Params, aligned, side_by_side
from megamoe_jit._device.tensor_map import encode_fp8_rows
from megamoe_jit._layer.checks import check_weights
from megamoe_jit._layer.expansion import ExpandedWeights
from megamoe_jit._layer.given_weights import WeightTensors, require_tensors
from megamoe_jit._layer.memory import Place
from megamoe_jit._layer.raw_inputs import RawInputs
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec import KernelSpec
from megamoe_jit._spec.abi import ACT_BOX_ROWS, COUNTER_ROWS, SMALL_BOX_ROWS
from megamoe_jit.heuristics.select import Choice

MAX_CHECKED = 1024  #: weights that are known to be right, at a time: layers that share the memory
_RAW, _RAW_AT = side_by_side(
    "raw_x", "raw_ids", "raw_weights", "raw_x_stride", "raw_ids_stride",
    "raw_weights_stride", "raw_formats", "weight_factor",
)  # fmt: skip


def _fields(spec: KernelSpec) -> list[str]:
    """The fields of `Params` with the addresses of both matrices' parts."""
    codes = "packed{}" if spec.variant.expands else "weight{}"
    names = {part: f"weight{{}}_{part}" for part in spec.weights.part_names} | {"codes": codes}
    return [names[part].format(matrix) for matrix in (1, 2) for part in spec.weights.part_names]


class SeenTensors:
    """Tensors of both matrices that were looked at, which it does not keep alive, and where they were."""

    __slots__ = ("_count", "tensors")

    def __init__(self, held: tuple[torch.Tensor, ...]) -> None:
        self._count = len(held)
        self.tensors = tuple((weakref.ref(tensor), tensor.data_ptr()) for tensor in held)

    def is_of(self, held: tuple[torch.Tensor, ...]) -> bool:
        """Whether these are the very tensors, where they were: a tensor can be given other memory."""
        for tensor, (known, address) in zip(held, self.tensors):  # noqa: B905 strict would double the time
            if known() is not tensor or tensor.data_ptr() != address:
                return False
        return len(held) == self._count


@dataclass(frozen=True, slots=True)
class CallPlan:
    """What a call with these tokens and options launches."""

    kernel: BoundKernel
    choice: Choice
    num_sms: int
    sort_blocks: int
    two_sides: bool  #: each half of the L2 has columns of its own
    debug: bool = False  #: the call looks at expert ids before


class BoundKernel:
    """A kernel bound to a memory: a call writes a few fields of `params` and launches.

    `timeline` is the address of the room for the records of a kernel that keeps some.
    """

    def __init__(self, spec: KernelSpec, place: Place, timeline: int = 0) -> None:
        self.spec, self._device = spec, place.device
        self.params = aligned(Params)
        loaded = load_kernel(spec, place.device.index, param_bytes=ctypes.sizeof(Params))
        self.key: str = loaded.key  #: its name in the cache
        self.launcher = Launcher(loaded, self.params, threads=spec.threads)
        self._weights: SeenTensors | None = None  #: whose addresses `params` has
        self._weight_fields = _fields(spec)
        self._expanded: ExpandedWeights | None = None
        self._planned: CallPlan | None = None  #: whose values `params` has
        self._own: tuple[int, float, float] | None = None  #: and these, of the call
        self._checked: dict[int, SeenTensors] = {}  #: by the identity of the first tensor
        sides = sides_of_sms(place.device) if get_settings().l2_sides else None
        self.knows_sides = sides is not None  #: which SMs are near which half of the L2
        if sides is not None:
            self.params.side_of_sm[:] = sides
        self.params.timeline = timeline
        self.params.timeout_ns = int(get_settings().timeout_s * 1e9)
        self._bind(place)

    def _bind(self, place: Place) -> None:
        params, layout, shape = self.params, place.layout, self.spec.shape
        for section in layout.symmetric:
            setattr(params, section.name, section.offset)
        for section in layout.local:
            setattr(params, section.name, place.local + section.offset)
        for rank, address in enumerate(place.peers):
            params.peers[rank] = address
        rows = layout.pool_rows
        encode_fp8_rows(params.act1, params.act1_pool, rows, shape.hidden, ACT_BOX_ROWS)
        encode_fp8_rows(params.act2, params.act2_pool, rows, shape.intermediate, ACT_BOX_ROWS)
        encode_fp8_rows(params.act1_small, params.act1_pool, rows, shape.hidden, SMALL_BOX_ROWS)
        encode_fp8_rows(params.act2_small, params.act2_pool, rows, shape.intermediate, SMALL_BOX_ROWS)
        params.pool_rows = rows
        params.counters = layout.rows // COUNTER_ROWS
        params.rank, params.most_pairs = place.rank, layout.most_pairs
        params.fault = place.fault

    def expand_in(self, room: ExpandedWeights) -> None:
        """Have a kernel that expands its weights do so there."""
        if room is not self._expanded:
            params = self.params
            params.expanded1, params.expanded2, params.expanded = room.addresses
            params.weight1, params.weight2 = params.expanded1, params.expanded2
            self._expanded = room

    def use_weights(self, l1: WeightTensors, l2: WeightTensors) -> None:
        """Point the kernel at these; the same tensors at the same addresses are checked once.

        Raises:
            ConfigError: they are not the kernel's weights.
        """
        try:
            held = (*l1, *l2)
            known = self._checked.get(id(held[0]))
            if known is None or not known.is_of(held):
                known = self._check(l1, l2)
        except (TypeError, RuntimeError, IndexError):  # costs nothing where they are tensors
            require_tensors("l1", l1)
            require_tensors("l2", l2)
            raise
        if known is not self._weights:
            self._weights = None  # until all of it is set: an exception between two must not leave a mixture
            for name, (_, address) in zip(self._weight_fields, known.tensors, strict=True):
                setattr(self.params, name, address)
            self._weights = known

    def _check(self, l1: WeightTensors, l2: WeightTensors) -> SeenTensors:
        check_weights(l1, l2, self.spec, self._device)
        held = (*l1, *l2)
        if len(self._checked) >= MAX_CHECKED:
            self._checked.clear()
        known = self._checked[id(held[0])] = SeenTensors(held)
        return known

    def launch(
        self,
        plan: CallPlan,
        stream: int,
        y: torch.Tensor,
        tokens: int,
        stats: torch.Tensor | None,
        clamp: float,
        raw: RawInputs | None,
        shared_weight: float,
    ) -> None:
        """Enqueue a call on a stream, given by its raw handle, with the weights that were set last."""
        params, own = self.params, (tokens, clamp, shared_weight)
        if plan is not self._planned or own != self._own:
            self._follow(plan, own)
        params.y = y.data_ptr()
        params.stats = 0 if stats is None else stats.data_ptr()
        if raw is not None:
            _RAW.pack_into(
                params, _RAW_AT, raw.x_at, raw.ids_at, raw.weights_at, raw.x_stride, raw.ids_stride,
                raw.weights_stride, raw.formats, raw.weight_factor,
            )  # fmt: skip
        self.launcher.launch(plan.num_sms, stream)

    def _follow(self, plan: CallPlan, own: tuple[int, float, float]) -> None:
        """Set what calls of one plan have in common, and these that most of them have: tokens, clamp, shared weight."""
        self._planned = None  # until all of it is set: an exception between two must not leave a mixture
        params, choice = self.params, plan.choice
        params.lag_tiles, params.item_shift = choice.lag_tiles, choice.rows_per_item.bit_length() - 1
        params.sort_blocks, params.want_sides = plan.sort_blocks, plan.two_sides
        params.expand_every = choice.expand_every
        params.tokens, params.clamp, params.shared_weight = own
        self._planned, self._own = plan, own
