"""`KernelSet`: the kernels that are bound to one memory, and which of them a call launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from megamoe_jit._device.layout import MAX_SORT_BLOCKS
from megamoe_jit._device.sms import sm_count
from megamoe_jit._errors import CaptureError, ConfigError
from megamoe_jit._layer.bound_kernel import BoundKernel, CallPlan
from megamoe_jit._layer.expansion import ExpandedWeights
from megamoe_jit._layer.group import collectively, require_equal
from megamoe_jit._layer.memory import Place
from megamoe_jit._settings.settings import Settings, get_settings
from megamoe_jit._spec import FP8, KernelSpec, Numerics, Variant, WeightFormat
from megamoe_jit._spec.abi import THREADS
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._text import shown
from megamoe_jit.heuristics.select import Choice, all_variants, choose

MAX_PLANS = 1024  #: remembered at a time; each is under a kilobyte and made in some 20 us


def sort_blocks(pairs: int) -> int:
    """Blocks that sort so many (token, slot) pairs at the head of a launch.

    Few at first, one pair for each of a block's threads without helpers: a second round costs 0.6 us. Each block also
    sums what all others counted, so beyond 16 there are more only where a block would have more than 2048 pairs.
    """
    return max(1, min(MAX_SORT_BLOCKS, max(min(-(-pairs // THREADS), 16), -(-pairs // 2048))))


_Kind = tuple[Variant, Numerics, Inputs, WeightFormat]  #: a kernel of one shape
#: What a plan depends on: tokens, variant, numerics, num_sms, inputs, weights, as a call has them.
Asked = tuple[int, str | None, bool | Numerics, int | None, Inputs, WeightFormat]


class KernelSet:
    """Kernels of one layer shape, bound to one memory.

    Args:
        place: the memory.
        group: of the ranks that share it, None for one.
        other_memory: called when there is more memory that kernels use.
    """

    def __init__(self, place: Place, group: object, other_memory: Callable[[], None]) -> None:
        self._place, self._group, self._other_memory = place, group, other_memory
        self.bound: dict[_Kind, BoundKernel] = {}
        self._prepared: set[tuple[Numerics, Inputs, WeightFormat]] = set()
        self._plans: dict[Asked, CallPlan] = {}
        self._planned_with: Settings | None = None
        self.expanded: ExpandedWeights | None = None  #: once a kernel needs it

    def spec(self, variant: Variant, numerics: Numerics, inputs: Inputs, weights: WeightFormat) -> KernelSpec:
        """The kernel of such calls."""
        shape, ranks = self._place.shape, self._place.ranks
        return KernelSpec(shape, variant, ranks, numerics=numerics, weights=weights, inputs=inputs)

    def is_prepared(self, numerics: Numerics, inputs: Inputs, weights: WeightFormat) -> bool:
        """Whether the kernels of several ranks were prepared, which they are together."""
        return (numerics, inputs, weights) in self._prepared

    def any_prepared(self, inputs: Inputs) -> bool:
        """Whether any with such inputs were."""
        return any(prepared is inputs for _, prepared, _ in self._prepared)

    def prepare(self, variant: Variant, numerics: Numerics, inputs: Inputs, weights: WeightFormat) -> BoundKernel:
        """The kernel, loaded and bound; with several ranks a collective at first, see `SymmBuffer.prepare`."""
        kernel = self.bound.get((variant, numerics, inputs, weights))
        if kernel is None:
            self.spec(variant, numerics, inputs, weights)  # raises if there is none
            wanted = self._with(variant, numerics, inputs, weights)
            ranks = self._place.ranks
            if ranks > 1 and torch.cuda.is_current_stream_capturing():
                raise CaptureError(
                    "kernels of several ranks are prepared collectively and not while a CUDA graph is being captured; "
                    f"call prepare({variant.value!r}, {numerics}) on every rank before the capture"
                )
            made = collectively(self._group, "preparing the kernels", lambda: self._bind(wanted))
            if ranks > 1:
                keys = {
                    f"kernel {v.value}, {i.value} inputs, {w.name}": kernel.key for (v, _, i, w), kernel in made.items()
                }
                require_equal(self._group, "their kernels", keys)
            self.bound.update(made)
            self._prepared.update(kind[1:] for kind in made)
            kernel = made[variant, numerics, inputs, weights]
        if variant.expands:
            self._expand(kernel)
        return kernel

    def _expand(self, kernel: BoundKernel) -> None:
        """Have a kernel expand its weights in the memory that all such kernels here share."""
        if self.expanded is None:
            self.expanded = ExpandedWeights(self._place, kernel.spec.local_experts)
            self._other_memory()
        kernel.expand_in(self.expanded)

    def _with(self, variant: Variant, numerics: Numerics, inputs: Inputs, weights: WeightFormat) -> Iterable[_Kind]:
        """What is prepared with a kernel: with several ranks, all that `auto` may take on another one beside it."""
        if self._place.ranks == 1:
            return [(variant, numerics, inputs, weights)]
        forms = (inputs,) if inputs is Inputs.STAGED else tuple(Inputs)
        limits = {"ranks": self._place.ranks, "most": self._place.layout.capacity}
        variants = dict.fromkeys((*all_variants(self._place.shape, weights, **limits), variant))
        return itertools.product(variants, (numerics,), forms, (weights,))

    def _bind(self, wanted: Iterable[_Kind]) -> dict[_Kind, BoundKernel]:
        with torch.cuda.device(self._place.device):
            made = {kind: self.bound.get(kind) or BoundKernel(self.spec(*kind), self._place) for kind in wanted}
            # together, so that a rank without the memory is missed before any kernel waits for it
            for (variant, *_), kernel in made.items():
                if variant.expands and self._place.ranks > 1:
                    self._expand(kernel)
            return made

    def choose(
        self, tokens: int, variant: str | None, num_sms: int | None, weights: WeightFormat = FP8
    ) -> tuple[Choice, int]:
        """What such a call takes, and the blocks of its launch; raises `ConfigError` if an option is not supported."""
        device, settings = self._place.device, get_settings()
        sms = sm_count(device)
        blocks = sms if num_sms is None else num_sms
        if type(blocks) is not int or not 1 <= blocks <= sms:
            raise ConfigError(f"num_sms = {shown(blocks)} is not supported; allowed: 1 to {sms}")
        choice = choose(
            self._place.shape,
            tokens,
            ranks=self._place.ranks,
            variant=settings.variant if variant is None else variant,
            cooperative_threshold=settings.cooperative_threshold,
            num_sms=blocks,
            gpu=torch.cuda.get_device_name(device),
            weights=weights,
        )
        return choice, blocks

    def known_plan(self, asked: Asked) -> CallPlan | None:
        """The plan of such a call if there was one with these settings; raises `ConfigError` if none can be meant."""
        settings = get_settings()
        if settings is not self._planned_with:
            self._plans.clear()
            self._planned_with = settings
        _, variant, numerics, num_sms, *_ = asked
        if num_sms is not None and type(num_sms) is not int:
            return None  # what equals a number finds its plan, and is none
        try:
            return self._plans.get(asked)
        except TypeError:  # costs nothing where they are what they should be
            given = f"variant = {shown(variant)}, fast_math = {shown(numerics)}, num_sms = {shown(num_sms)}"
            raise ConfigError(f"{given}; allowed: a name or None, a bool, a number or None") from None

    def new_plan(self, asked: Asked) -> CallPlan:
        """What such a call launches, remembered for the next one like it."""
        tokens, variant, numerics, num_sms, inputs, weights = asked
        choice, blocks = self.choose(tokens, variant, num_sms, weights)
        options = numerics if isinstance(numerics, Numerics) else Numerics(numerics)
        kernel = self.prepare(choice.variant, options, inputs, weights)
        # with fewer blocks than SMs they fall unevenly on the sides
        two_sides = kernel.knows_sides and blocks == sm_count(self._place.device)
        sorting = min(blocks, sort_blocks(tokens * self._place.shape.slots))
        plan = CallPlan(kernel, choice, blocks, sorting, two_sides, get_settings().debug)
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[asked] = plan
        return plan

    def forget_plans(self) -> None:
        """Have the next call plan again."""
        self._plans.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self.bound.clear()
        self._prepared.clear()
        self._plans.clear()
        self.expanded = None
