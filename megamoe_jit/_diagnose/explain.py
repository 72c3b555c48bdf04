"""Which kernel a call would take, and why, without making it: no GPU, no torch, nothing compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe_jit._diagnose.between import ONE_NODE, Between, Ways, between
from megamoe_jit._documents import Count, Digest, Document, content
from megamoe_jit._spec import DEFAULT_NUMERICS, FP8, KernelSpec, MoEShape, WeightFormat
from megamoe_jit._spec.compilable import Compilable
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._spec.variants import Variant
from megamoe_jit.heuristics.select import Choice, choose
from megamoe_jit.heuristics.tables import find_gpu, table_for

DEFAULT_SMS = 132  #: streaming multiprocessors of an H100 SXM and of an H200


@dataclass(frozen=True, slots=True)
class AskedFor:
    """The GPU that calls are chosen for.

    Attributes:
        gpu: full name of the GPU that calls are chosen for; null without --gpu and a GPU, or with --gpu none
        measured: whether there are measurements of this GPU to choose by
    """

    gpu: str | None
    measured: bool


@dataclass(frozen=True)  # without slots, which a class takes from one of its bases alone
class Case:
    """What was asked about.

    Attributes:
        name: of the shape
        ranks: that share the experts
        tokens: of one rank
        weights: the format that they are stored in
    """

    name: str
    shape: MoEShape
    ranks: Count
    tokens: Count
    weights: str


@dataclass(frozen=True, slots=True)
class KernelState:
    """A kernel as a call would find it.

    Attributes:
        kernel: its symbol
        key: null without a compiler to give it one
        path: of its entry
        problem: why there is no compiler to give it a key
    """

    kernel: str
    key: Digest | None
    cached: bool
    path: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a call gives its kernel.

    Attributes:
        block_m: rows of a tile, at most
        stages: of the pipeline of tiles
        lag_tiles: tiles of the first GEMM before the first of the second
    """

    blocks: Count
    block_m: Count
    stages: Count
    lag_tiles: Count
    rows_per_item: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(KernelState, Case):
    """Which kernel a call takes.

    Attributes:
        between: with several nodes, how rows travel; the shape is that of a node then
    """

    variant: Variant
    parameters: Parameters
    reasons: tuple[str, ...]
    between: Between | None = None


@dataclass(frozen=True, slots=True)
class Explain(AskedFor, Document):
    """Which kernel each call takes, and why."""

    KIND = "explain"

    calls: tuple[Call, ...]


def gpu_asked_for(name: str | None) -> AskedFor:
    """The GPU whose measurements are to be used.

    Args:
        name: full or short name of one that was measured, or `none`; this machine's first GPU if None.

    Raises:
        ConfigError: nothing was measured on a GPU of this name.
    """
    gpu: str | None = None
    if name is None:
        from megamoe_jit._device.driver import gpus

        gpu = next((each.name for each in gpus().gpus), None)
    elif name.lower() != "none":
        gpu = find_gpu(name)
    return AskedFor(gpu, table_for(gpu) is not None)


def kernel_state(spec: Compilable) -> KernelState:
    """The key of a kernel and where it is cached, found as a call would find it, but not loaded."""
    from megamoe_jit._jit.lookup import Fit, Wanted, lookup

    wanted = Wanted.of(spec)
    found = next((at for at in lookup(wanted, least=Fit.LOADS) if at.cache.usable(at.key, spec.kernel_name)), None)
    if found is None:
        return KernelState(spec.kernel_name, wanted.key, False, None, str(wanted.problem) if wanted.problem else None)
    return KernelState(spec.kernel_name, found.key, True, str(found.path), None)


def choice_for(case: Case, variant: str | None, num_sms: int, gpu: str | None) -> Choice:
    """What such a call takes, by the settings and by what was measured; without `variant`, what the settings say."""
    from megamoe_jit._settings.settings import get_settings

    settings = get_settings()
    return choose(
        case.shape,
        case.tokens,
        ranks=case.ranks,
        variant=variant or settings.variant,
        cooperative_threshold=settings.cooperative_threshold,
        num_sms=num_sms,
        gpu=gpu,
        weights=WeightFormat.parse(case.weights),
    )


def explain(
    shape: MoEShape,
    tokens: int,
    *,
    name: str = "",
    ranks: int = 1,
    variant: str | None = None,
    numerics: Numerics = DEFAULT_NUMERICS,
    num_sms: int = DEFAULT_SMS,
    gpu: str | None = None,
    weights: str = FP8.name,
    ways: Ways = ONE_NODE,
) -> Call:
    """Which kernel a call with so many tokens takes, with which parameters, and why.

    Args:
        shape: sizes of the layer.
        tokens: tokens of one rank.
        name: of the shape.
        ranks: ranks that share the experts.
        variant: the `variant` of the call; the settings' one if None.
        numerics: the numeric options of the call.
        num_sms: blocks of the launch.
        gpu: full name of the GPU, for what was measured on it; None for none.
        weights: the format of the weights.
        ways: how the call goes over several nodes, which share the experts of `shape`.

    Raises:
        ConfigError: a value is not supported.
    """
    beyond = None
    if ways.nodes > 1:
        shape, beyond = between(shape, tokens, ranks, ways, WeightFormat.parse(weights))
        numerics = replace(numerics, float32_out=beyond.partial == "fp32")
    case = Case(name, shape, ranks, tokens, weights)
    choice = taken = choice_for(case, variant, num_sms, gpu)
    if beyond is not None:  # the variant is that of the rank's own tokens, the rest follows from rows
        taken = choice_for(replace(case, tokens=beyond.launch_rows), choice.variant.value, num_sms, gpu)
    spec = KernelSpec(shape, choice.variant, ranks, numerics=numerics, weights=WeightFormat.parse(weights))
    parameters = Parameters(num_sms, spec.block_m, spec.stages, taken.lag_tiles, taken.rows_per_item)
    return Call(
        **content(case),
        variant=choice.variant,
        parameters=parameters,
        reasons=choice.reasons,
        **content(kernel_state(spec)),
        between=beyond,
    )
