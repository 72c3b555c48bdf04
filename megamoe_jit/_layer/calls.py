"""The calls: the buffer of a layer, `fp8_mega_moe`, and the two forms of it that force a variant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._device.layout import DEFAULT_POOL_ROWS
from megamoe_jit._errors import ConfigError, UnsupportedDeviceError
from megamoe_jit._layer.admit import admit_first, check_ids, check_stats
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import (
    RECIPE,
    check_activation,
    check_bound,
    check_neutral,
    check_recipe,
    check_shared_weight,
    check_tensor,
)
from megamoe_jit._layer.given_weights import WeightTensors, by_old_names, format_of_call
from megamoe_jit._layer.group import collectively, group_size
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._layer.stage import require_buffer
from megamoe_jit._layer.steady import SteadyCall
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec import MoEShape, Variant, check_int
from megamoe_jit._spec.inputs import Inputs
from megamoe_jit._spec.numerics import Numerics, numerics_of
from megamoe_jit._text import first_line, shown

__all__ = [
    "fp8_mega_moe",
    "fp8_mega_moe_cooperative",
    "fp8_mega_moe_pingpong",
    "get_symm_buffer_for_mega_moe",
    "get_symm_buffer_for_sm90_mega_moe",
    "place_of",
]


def get_symm_buffer_for_mega_moe(
    group: Any,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    num_shared_experts: int = 0,
    use_fp8_dispatch: bool | None = None,
    mma_type: str = "fp8xfp4",
    activation: str = "swiglu",
    *,
    device: torch.device | str | int | None = None,
    max_pool_rows: int = DEFAULT_POOL_ROWS,
) -> SymmBuffer:
    """Allocate the buffer of one rank; a collective of all ranks of `group`.

    Args:
        group: the process group whose ranks share the experts, one GPU each.  None or a group of one rank: plain CUDA
            memory, torch.distributed is not needed.
        num_experts: experts of all ranks that the router chooses from, 1 to 1024, a multiple of the number of ranks.
        num_max_tokens_per_rank: most tokens of a call, 1 to 32768; rounded up to a multiple of 128.
        num_topk: slots of a token that the router fills, 1 to 32.
        hidden: columns of a token, a multiple of 128 up to 262144.
        intermediate_hidden: columns between the two products, likewise.
        num_shared_experts: experts of `intermediate_hidden` columns that every token goes to beside, in the same
            launch; each rank has all of them, behind its own of `num_experts`. At most 32 slots with `num_topk`.
        use_fp8_dispatch: must be True or None, which is the same.
        mma_type: must begin with "fp8x", as DeepGEMM wants it on SM90. Whatever follows, a call takes the weights as
            they are, FP8 or MXFP4.
        activation: must be "swiglu".
        device: where; the current CUDA device by default.
        max_pool_rows: rows that the local pools hold at most, 4096 or more.  A batch with more of them is served
            too: the pools become rings, and dispatch waits for the matrix work.

    DeepGEMM has had another order, with `use_fp8_dispatch` and `activation` after the sizes: a bool in the seventh
    place is taken for that.

    Returns:
        The buffer; its views are not initialised.

    Raises:
        ConfigError: a value is not supported, or the memory is not there (says the bytes).
        UnsupportedDeviceError: there is no GPU, or it is no Hopper GPU.
        CaptureError: the current stream is capturing a CUDA graph; no other rank is asked or told.
        RankMismatchError: the ranks ask for different layers, or have different kernel sources.
        PeerTimeoutError: a rank did not come before the process group gave up.
    """
    if type(num_shared_experts) is bool:
        old = (num_shared_experts, activation if use_fp8_dispatch is None else use_fp8_dispatch)
        num_shared_experts, (use_fp8_dispatch, activation) = 0, old  # type: ignore[assignment]
    ranks = group if group_size(group) > 1 else None
    refuse_capture("a buffer cannot be made", "make it before the capture")  # even asking other ranks would end it

    def admit() -> tuple[MoEShape, torch.device]:
        check_neutral(use_fp8_dispatch, mma_type)
        check_activation(activation)
        check_int("num_shared_experts", num_shared_experts)
        shape = MoEShape(hidden, intermediate_hidden, num_experts, num_topk, num_shared_experts)
        check_int("num_max_tokens_per_rank", num_max_tokens_per_rank)
        check_int("max_pool_rows", max_pool_rows)
        if not torch.cuda.is_available():
            raise UnsupportedDeviceError(
                "no CUDA device is available; these kernels need a Hopper GPU and its driver; "
                "`megamoe-jit doctor` says more"
            )
        return shape, place_of(device)

    shape, where = collectively(ranks, "checking the layer", admit)
    return SymmBuffer(shape, num_max_tokens_per_rank, where, ranks, max_pool_rows)


def place_of(device: torch.device | str | int | None) -> torch.device:
    """The device that is meant, with its index."""
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int | None):
        raise ConfigError(f"device = {shown(device)} is not supported; allowed: a CUDA device, its number or name")
    try:
        place = torch.device("cuda", device) if isinstance(device, int) else "cuda" if device is None else device
        return torch.empty(0, dtype=torch.uint8, device=place).device
    except (RuntimeError, OverflowError, TypeError, ValueError, AssertionError) as error:
        allowed = "allowed: a CUDA device of this machine, its number or name"
        raise ConfigError(f"device = {shown(device)} cannot be used: {first_line(error, 300)}; {allowed}") from None


def get_symm_buffer_for_sm90_mega_moe(
    group: Any,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    use_fp8_dispatch: bool = True,
    activation: str = "swiglu",
) -> SymmBuffer:
    """`get_symm_buffer_for_mega_moe` by the name, and with the parameters, that DeepGEMM has for SM90 alone.

    Args:
        group: the process group whose ranks share the experts, or None.
        num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden: sizes, as there.
        use_fp8_dispatch: must be True.
        activation: must be "swiglu".

    Returns:
        The buffer, as there.

    Raises:
        MegaMoeError: as there.
    """
    sizes = (group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden)
    return get_symm_buffer_for_mega_moe(*sizes, use_fp8_dispatch=use_fp8_dispatch, activation=activation)


def fp8_mega_moe(
    y: torch.Tensor,
    l1_weights: WeightTensors | None = None,
    l2_weights: WeightTensors | None = None,
    sym_buffer: SymmBuffer | None = None,
    cumulative_local_expert_recv_stats: torch.Tensor | None = None,
    recipe: Sequence[int] = RECIPE,
    activation: str = "swiglu",
    activation_clamp: float | None = None,
    fast_math: bool = True,
    num_tokens_bound: int | None = None,
    *,
    num_sms: int | None = None,
    variant: str | None = None,
    shared_weight: float = 1.0,
    l1: WeightTensors | None = None,
    l2: WeightTensors | None = None,
) -> None:
    """Run one MoE layer on the tokens staged in `sym_buffer`, in one kernel launch on the current stream.

    ``y[t] = sum over slots k of topk_weights[t, k] * down(quantise(swiglu(gate_up(x[t]))))`` with the experts
    ``topk_idx[t, k]``.  Masked slots (-1) add nothing; a token with all slots masked gives zeros.  Any other id that is
    no expert counts as masked too; with MEGAMOE_JIT_DEBUG it is refused.

    Where the buffer has shared experts, each of the T tokens goes to those of its rank beside, with `shared_weight`,
    one whose slots are all masked too.

    Args:
        y: bf16 ``[T, hidden]``, written; T is the number of tokens staged, 0 to the buffer's capacity.
        l1_weights: e4m3 or e5m2 codes ``[local experts, 2 * intermediate, hidden]`` and float32 scales
            ``[local experts, 2 * intermediate / 128, hidden / 128]``; or MXFP4 in three parts: codes uint8, two to a
            byte, exponents uint8, one for 32 columns, and scales as those of FP8.  They are in the order of
            `transform_weights_for_mega_moe_sm90` and marked so, by it or by `mark_transformed`.  Shared experts are the
            last local ones.
        l2_weights: ``[local experts, hidden, intermediate]`` and ``[local experts, hidden / 128, intermediate / 128]``,
            likewise.
        sym_buffer: the inputs, staged by the caller into its views before each call.
        cumulative_local_expert_recv_stats: int32 ``[local experts]``, without shared ones; rows of each expert are
            added to it.
        recipe: quantisation blocks; must be (128, 128, 128).
        activation: must be "swiglu".
        activation_clamp: bounds the gate from above and the up projection on both sides, 0 or more; None for no bound.
        fast_math: approximate exponential and reciprocal in SwiGLU; nothing else changes.
        num_tokens_bound: most tokens of any rank in this call, as DeepGEMM wants to know; checked, and not needed here.
        num_sms: blocks of the launch, 1 to the number of SMs, to leave SMs to other streams; all SMs by default.
        variant: "auto" or the name of a `Variant`; the setting MEGAMOE_JIT_VARIANT by default.
        shared_weight: of the rows of shared experts, where there are some.
        l1, l2: the old names of the weights.

    Raises:
        ConfigError: an argument is not supported; nothing was launched.
        CaptureError: first use of this kernel during CUDA-graph capture.
        KernelMissingError: the kernel is not cached, and compiling is forbidden.
        ToolchainError: there is no NVRTC to compile it with.
        RenderError: its source cannot be rendered.
        CompileError: it does not compile.
        LoadError: the driver refused the kernel.
        LaunchError: the driver refused the launch.
        RankMismatchError: the ranks have different kernels.
        PeerTimeoutError: a rank did not come to the first call, or to an earlier one.
        DeviceFaultError: an earlier call on this buffer failed.

    Calls on one buffer are ordered, also across streams.  What is staged on another stream than the last call's is not:
    call `sym_buffer.wait_for_last()` before.  Replays of a captured graph are for the caller to order with other calls
    on the same buffer.

    With several ranks this is a collective.  Until the kernels are prepared, an argument that is refused on one rank is
    refused on all; later the other ranks wait in the kernel, to its deadline.
    """
    buffer = sym_buffer if isinstance(sym_buffer, SymmBuffer) else require_buffer(sym_buffer)
    if l1 is not None or l2 is not None:
        l1_weights, l2_weights = by_old_names(l1_weights, l2_weights, l1, l2)
    stats = cumulative_local_expert_recv_stats
    numeric = (fast_math,)  # the fields of `Numerics`

    options = (*numeric, recipe, activation, activation_clamp, num_sms, variant, shared_weight)
    call = buffer.steady.find(y, l1_weights, options)
    if call is None:
        arguments = y, buffer, recipe, activation, activation_clamp, num_tokens_bound, stats, shared_weight
        call = _new_call(arguments, (l1_weights, l2_weights), numeric, num_sms, variant, options)
    else:
        if num_tokens_bound is not None:
            check_bound(num_tokens_bound, call.tokens, buffer.num_max_tokens_per_rank)
        if stats is not None:
            check_stats(stats, buffer)
    _, _, plan, tokens, clamp = call
    if plan.debug:
        check_ids(buffer.topk_idx[:tokens], buffer)
    buffer.launch(plan, y, tokens, l1_weights, l2_weights, stats, clamp, None, shared_weight)  # type: ignore[arg-type]


def _new_call(
    arguments: tuple[Any, ...],
    weights: Any,
    numeric: tuple[bool, ...],
    num_sms: int | None,
    variant: str | None,
    options: tuple[Any, ...],
) -> SteadyCall:
    """What is not known yet of a call, once its arguments are checked; remembered for the next one like it.

    Args:
        arguments: of `_admit`.
        weights: of both products; checked at the launch, but on several ranks here once.
        numeric: the fields of `Numerics`.
        num_sms, variant: as given.
        options: what the call is known by.
    """
    buffer = arguments[1]
    if buffer.ranks > 1:
        admit_first(buffer, partial(_admit, *arguments), weights, variant, numeric, num_sms, Inputs.STAGED)
    tokens, clamp = _admit(*arguments)
    try:
        numerics = numerics_of(*numeric)
    except TypeError:  # what cannot be hashed is no option either
        numerics = Numerics(*numeric)
    plan = buffer.plan(tokens, variant, numerics, num_sms, Inputs.STAGED, format_of_call(weights[0]))
    call = SteadyCall(options, get_settings(), plan, tokens, clamp)
    buffer.steady.note(weights[0], call)
    return call


def _admit(
    y: torch.Tensor,
    buffer: SymmBuffer,
    recipe: Sequence[int],
    activation: str,
    clamp: float | None,
    bound: int | None,
    stats: torch.Tensor | None,
    shared_weight: float,
) -> tuple[int, float]:
    """The tokens of a call and its clamp as the kernel takes it, once its arguments are checked but for the weights."""
    if type(shared_weight) is not float or shared_weight != 1.0:
        check_shared_weight(shared_weight, buffer.num_shared_experts)
    tokens = _tokens_of(y, buffer)
    check_tensor("y", y, torch.bfloat16, (tokens, buffer.hidden), buffer.device)
    if bound is not None:
        check_bound(bound, tokens, buffer.num_max_tokens_per_rank)
    if stats is not None:
        check_stats(stats, buffer)
    return tokens, check_recipe(recipe, activation, clamp)


def _tokens_of(y: torch.Tensor, buffer: SymmBuffer) -> int:
    """Rows of the output, which are the tokens of the call."""
    try:
        tokens, _ = y.shape
    except (AttributeError, RuntimeError):  # costs nothing where it is a dense tensor
        require_tensor("y", y)
        raise
    except (ValueError, TypeError):
        require_tensor("y", y)
        raise ConfigError(f"y has shape {tuple(y.shape)}; allowed: [tokens, {buffer.hidden}]") from None
    if tokens > buffer.num_max_tokens_per_rank:
        raise ConfigError(f"y has {tokens} rows; allowed: at most the buffer's {buffer.num_max_tokens_per_rank} tokens")
    return tokens


def _forcing(variant: Variant) -> Callable[..., None]:
    """`fp8_mega_moe` with its signature, but for the variant, which is forced."""

    def call(*arguments: Any, **options: Any) -> None:
        fp8_mega_moe(*arguments, variant=variant.value, **options)

    whole = inspect.signature(fp8_mega_moe)
    left = [each for name, each in whole.parameters.items() if name != "variant"]
    call.__signature__ = whole.replace(parameters=left)  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = f"fp8_mega_moe_{variant.value}"
    call.__doc__ = (
        f"`fp8_mega_moe` with the {variant.value} kernel (tiles of {variant.block_m} rows), whatever the token count."
    )
    return call


fp8_mega_moe_pingpong = _forcing(Variant.PINGPONG)
"""`fp8_mega_moe` with the pingpong kernel (tiles of 64 rows), whatever the token count; without `variant`."""

fp8_mega_moe_cooperative = _forcing(Variant.COOPERATIVE)
"""`fp8_mega_moe` with the cooperative kernel (tiles of 128 rows), whatever the token count; without `variant`."""
