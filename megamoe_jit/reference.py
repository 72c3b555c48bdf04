"""The MoE layer in plain FP32 PyTorch, with the kernel's numerics; runs on any device, and in any of torch's modes.

Per (token, slot) of the router's top-k::

    g, u = x @ w13[e].T                       FP32
    h    = silu(min(g, c)) * clamp(u, -c, c)  FP32
    h    = e4m3 codes, one scale per 128 columns
    o    = bf16(h @ w2[e].T)
    y   += weight * o                         FP32, in slot order; bf16 at the end

Slots whose expert is -1, or no expert at all, contribute nothing, whatever their weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.given_weights import WeightTensors, check_pairs, format_of, written
from megamoe_jit._layer.marks import require_plain
from megamoe_jit._layer.quantize import dequantize_activations, quantize_activations, require_tensor
from megamoe_jit._spec import BLOCK, MAX_EXPERTS, check_clamp, check_flag, check_int
from megamoe_jit._spec.checks import check, check_float32

__all__ = ["activate", "calc_diff", "expert_counts", "moe_reference", "row_diffs", "swiglu", "with_shared_experts"]

_CHUNK = 8192  #: rows of one expert worked on at once; bounds the scratch of a hot expert


def _precisions() -> list[tuple[Callable[[], str], Callable[[str], None], str]]:
    """Where torch keeps how exact a product of float32 is: getter, setter, and the word for "in float32"."""
    owners = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if not all(hasattr(owner, "fp32_precision") for owner in owners):  # torch before 2.9
        return [(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")]
    name = "fp32_precision"  # older names may not even be read once the program has set these
    return [(partial(getattr, owner, name), partial(setattr, owner, name), "ieee") for owner in owners]


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Products in float32 inside, whatever the caller has set, which is put back.

    That is TF32 and bfloat16 for products of float32, autocast, and deterministic algorithms, under which cuBLAS
    refuses to multiply without a workspace of its own.
    """
    with ExitStack() as after:
        for get, put, exact in _precisions():
            after.callback(put, get())
            put(exact)
        mode = torch.get_deterministic_debug_mode()
        if mode:
            after.callback(torch.set_deterministic_debug_mode, mode)
            torch.set_deterministic_debug_mode("default")
        after.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _refuse_capture(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        refuse_capture("the reference waits for the device, which is not possible", "call it outside of the capture")


def swiglu(gate: torch.Tensor, up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """``silu(min(gate, clamp)) * clamp(up, -clamp, clamp)``; NaN stays NaN.

    Args:
        gate: ``[n, I]``, any floating dtype.
        up: of the same shape.
        clamp: 0 or more; None for no bound.

    Returns:
        ``[n, I]``.

    Raises:
        ConfigError: a shape, a dtype or the bound is not supported.
    """
    _check_alike(gate, up, ("gate", "up"))
    check_clamp("clamp", clamp)
    return activate(gate, up, None if clamp is None else float(clamp))


def activate(gate: torch.Tensor, up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """`swiglu` of arguments that were checked; torch.compile takes it as one graph."""
    if clamp is not None:
        gate = gate.clamp(max=clamp)
        up = up.clamp(min=-clamp, max=clamp)
    return torch.nn.functional.silu(gate) * up


def expert_counts(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Rows each expert receives.

    Args:
        topk_idx: int64 or int32 ``[T, K]``; what is no expert is masked, an expert may appear twice in a row.
        num_experts: Number of experts.

    Returns:
        int32 ``[num_experts]``.

    Raises:
        ConfigError: the ids or the number are not supported.
        CaptureError: the ids are on a GPU whose current stream is capturing.
    """
    _check_ids(topk_idx)
    check_int("num_experts", num_experts)
    check(0 <= num_experts <= MAX_EXPERTS, "num_experts", num_experts, f"0 to {MAX_EXPERTS}")
    _refuse_capture(topk_idx)
    flat = topk_idx.reshape(-1)
    return torch.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts).to(torch.int32)


def with_shared_experts(
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    num_shared_experts: int,
    *,
    shared_weight: float = 1.0,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's ids and weights with the slots of shared experts, as a layer that has none would need them.

    Experts are numbered as their weights lie then: each rank's part of the routed ones, followed by the shared ones. On
    one rank that leaves the router's numbers as they are.

    Args:
        topk_idx: int64 or int32 ``[T, K]``; what is no expert stays masked.
        topk_weights: ``[T, K]``.
        num_experts: Experts of the router, those of all ranks.
        num_shared_experts: Shared experts of each rank.
        shared_weight: Their weight.
        rank: Whose tokens these are.
        ranks: Ranks that share the experts.

    Returns:
        int64 and the dtype of `topk_weights`, ``[T, K + num_shared_experts]``.

    Raises:
        ConfigError: an argument is not supported, ids and weights do not fit each other, or the ranks cannot share the
            experts evenly.
    """
    _check_ids(topk_idx)
    require_tensor("topk_weights", topk_weights)
    if topk_idx.ndim != 2 or topk_weights.shape != topk_idx.shape or topk_weights.device != topk_idx.device:
        given = f"topk_idx is {tuple(topk_idx.shape)} on {topk_idx.device}"
        given = f"{given}, topk_weights {tuple(topk_weights.shape)} on {topk_weights.device}"
        raise ConfigError(f"{given}; allowed: [tokens, topk], both alike")
    sizes = {"num_experts": num_experts, "num_shared_experts": num_shared_experts, "rank": rank, "ranks": ranks}
    for name, number in sizes.items():
        check_int(name, number)
        check(number <= MAX_EXPERTS, name, number, f"at most {MAX_EXPERTS}")
    shared_weight = check_float32("shared_weight", shared_weight)
    if ranks < 1 or num_experts < 1 or num_experts % ranks or not 0 <= rank < ranks or num_shared_experts < 0:
        given = f"{num_experts} experts and {num_shared_experts} shared ones, rank {rank} of {ranks}"
        raise ConfigError(f"{given}; allowed: experts that the ranks share evenly")
    local, real = num_experts // ranks, (topk_idx >= 0) & (topk_idx < num_experts)
    spread = topk_idx + torch.div(topk_idx, local, rounding_mode="floor") * num_shared_experts
    ids = torch.where(real, spread, -1).long()
    first = rank * (local + num_shared_experts) + local
    shared = torch.arange(first, first + num_shared_experts, dtype=torch.int64, device=ids.device)
    weights = topk_weights.new_full((ids.shape[0], num_shared_experts), shared_weight)
    return torch.cat((ids, shared.expand(ids.shape[0], -1)), 1), torch.cat((topk_weights, weights), 1)


def _check_ids(topk_idx: torch.Tensor) -> None:
    require_tensor("topk_idx", topk_idx)
    if topk_idx.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"topk_idx has dtype {topk_idx.dtype}; allowed: int64 or int32")


def _check(
    x: torch.Tensor, x_sf: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, l1: WeightTensors, l2: WeightTensors
) -> None:
    """Raise `ConfigError` unless the arguments of `moe_reference` fit together."""
    stored = check_pairs(l1, l2, ordered=False)
    for matrix, what, each in written(l1, l2, stored):
        require_plain(matrix, each, what=what)
    if l1[0].ndim != 3:
        raise ConfigError(f"l1 weights have shape {tuple(l1[0].shape)}; allowed: [experts, 2I, H]")
    _check_ids(ids)
    require_tensor("x", x)
    hidden, rows = l2[0].shape[1], x.shape[:1]
    for name, tensor, shape in (
        ("x", x, (*rows, hidden)),
        ("x_sf", x_sf, (*rows, hidden // BLOCK)),
        ("topk_idx", ids, (*rows, *ids.shape[1:2])),
        ("topk_weights", weights, (*rows, *ids.shape[1:2])),
    ):
        require_tensor(name, tensor)
        if len(shape) != 2 or tuple(tensor.shape) != shape:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; allowed: [tokens, ...], here {shape}")
        if tensor.device != l1[0].device:
            raise ConfigError(f"{name} is on {tensor.device}; allowed: {l1[0].device}, where the weights are")
    if x.dtype is not torch.float8_e4m3fn or x_sf.dtype is not torch.float32 or not weights.is_floating_point():
        given = f"x has dtype {x.dtype}, x_sf {x_sf.dtype}, topk_weights {weights.dtype}"
        raise ConfigError(f"{given}; allowed: float8_e4m3fn, float32 and a floating one")


def _expert(
    x: torch.Tensor, l1: WeightTensors, l2: WeightTensors, expert: int, clamp: float | None, requantize: bool
) -> torch.Tensor:
    """Output float32 ``[n, H]`` of one expert for rows float32 ``[n, H]``."""
    w13, w2 = (
        format_of(name, given).dequantize(*(each[expert] for each in given)) for name, given in (("l1", l1), ("l2", l2))
    )
    out = torch.empty_like(x)
    for begin in range(0, x.shape[0], _CHUNK):
        gate, up = (x[begin : begin + _CHUNK] @ w13.T).chunk(2, dim=-1)
        h = activate(gate, up, clamp)
        if requantize:
            h = dequantize_activations(*quantize_activations(h))
        out[begin : begin + _CHUNK] = h @ w2.T
    return out


@torch.no_grad()
def moe_reference(
    x: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    l1: WeightTensors,
    l2: WeightTensors,
    *,
    activation_clamp: float | None = None,
    requantize: bool = True,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """One MoE layer, expert by expert.

    Args:
        x: float8_e4m3fn ``[T, H]``.
        x_sf: float32 ``[T, H / 128]``.
        topk_idx: int64 or int32 ``[T, K]``; -1, or any other id that is no expert, for a masked slot.
        topk_weights: ``[T, K]``, any floating dtype.
        l1: ``w13`` float8_e4m3fn or float8_e5m2 ``[E, 2I, H]``, gate rows first (*not* transformed), and scales float32
            ``[E, 2I / 128, H / 128]``; or MXFP4 codes uint8 ``[E, 2I, H / 2]`` and e8m0 exponents ``[E, 2I, H / 32]``.
        l2: ``w2`` ``[E, H, I]`` and scales float32 ``[E, H / 128, I / 128]``; or likewise.
        activation_clamp: Bound of gate (from above) and of up (both sides); None for no bound.
        requantize: False leaves out both roundings inside the layer, that of the intermediate to e4m3 and
            that of each slot to bf16: the layer in exact FP32 on the same inputs.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` ``[T, H]``; a token whose slots are all masked gives zeros.

    Raises:
        ConfigError: the arguments do not fit together, or the weights are marked as transformed.
        CaptureError: the tensors are on a GPU whose current stream is capturing.
    """
    _check(x, x_sf, topk_idx, topk_weights, l1, l2)
    check_clamp("activation_clamp", activation_clamp)
    clamp = None if activation_clamp is None else float(activation_clamp)
    check_flag("requantize", requantize)
    floating = isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point
    check(floating, "out_dtype", out_dtype, "a floating dtype")
    _refuse_capture(x)
    experts = l1[0].shape[0]
    topk_idx = torch.where((topk_idx >= 0) & (topk_idx < experts), topk_idx, -1)
    tokens, hidden = x.shape
    topk = topk_idx.shape[1]
    device = x.device
    flat = topk_idx.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat + 1, minlength=experts + 1).cumsum(0).tolist()  # [0] ends the masked slots
    slots = torch.zeros(tokens * topk, hidden, dtype=torch.bfloat16 if requantize else torch.float32, device=device)
    with _exact_products(device):
        for expert, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
            if begin == end:
                continue
            where = order[begin:end]
            rows = torch.div(where, topk, rounding_mode="floor")
            codes = x.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
            inputs = dequantize_activations(codes, x_sf[rows])
            slots[where] = _expert(inputs, l1, l2, expert, clamp, requantize).to(slots.dtype)
    slots = slots.view(tokens, topk, hidden)
    weights = torch.where(topk_idx < 0, 0.0, topk_weights.float())
    y = torch.zeros(tokens, hidden, dtype=torch.float32, device=device)
    for slot in range(topk):
        y += weights[:, slot, None] * slots[:, slot].float()
    return y.to(out_dtype)


def _check_alike(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    for name, tensor in zip(names, (a, b), strict=True):
        require_tensor(name, tensor)
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            raise ConfigError(f"{name} is {tensor.dtype} on {tensor.device}; allowed: a floating dtype, with values")
    if a.shape != b.shape:
        given = f"{names[0]} has shape {tuple(a.shape)}, {names[1]} {tuple(b.shape)}"
        raise ConfigError(f"{given}; allowed: equal ones")


def row_diffs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`calc_diff` of each pair of rows.

    Args:
        a: ``[T, H]``, any floating dtype.
        b: ``[T, H]``, any floating dtype.

    Returns:
        float64 ``[T]``; 0 where both rows are zero.

    Raises:
        ConfigError: shapes differ, or a dtype is not supported.
    """
    _check_alike(a, b)
    a, b = a.double(), b.double()
    energy = (a * a + b * b).sum(dim=-1)
    similarity = 2.0 * (a * b).sum(dim=-1) / energy
    return torch.where(energy == 0, 0.0, 1.0 - similarity)


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """``1 - 2 * sum(a * b) / sum(a * a + b * b)`` in float64; 0 when both are zero or empty.

    Args:
        a: of any shape and floating dtype.
        b: of the same shape, any floating dtype.

    Returns:
        The difference, 0 to 2.

    Raises:
        ConfigError: shapes differ, or a dtype is not supported.
        CaptureError: the tensors are on a GPU whose current stream is capturing.
    """
    _check_alike(a, b)
    _refuse_capture(a)
    return float(row_diffs(a.reshape(1, -1), b.reshape(1, -1)).item())
