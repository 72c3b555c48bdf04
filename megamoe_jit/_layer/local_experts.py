"""`mega_moe_local_experts`: one rank's experts on rows that somebody else has brought; the device knows how many."""

from __future__ import annotations

import torch

from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.calls import fp8_mega_moe
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.memory import mask_rows
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._layer.stage import require_buffer
from megamoe_jit._spec.checks import check
from megamoe_jit._text import counted

_MOST_ROWS = (1 << 31) - 1  #: between two experts
_COUNTS = (torch.int32, torch.int64, torch.uint32)


def mega_moe_local_experts(
    y: torch.Tensor,
    l1: WeightTensors,
    l2: WeightTensors,
    buffer: SymmBuffer,
    *,
    num_rows: torch.Tensor | None = None,
    expert_rows: torch.Tensor | None = None,
    rows_apart: int | None = None,
    align: int = 1,
    activation_clamp: float | None = None,
    fast_math: bool = True,
    num_sms: int | None = None,
    variant: str | None = None,
) -> None:
    """Run this rank's experts on rows that an exchange has brought: DeepEP, NCCL-EP, or an engine of your own.

    The kernel of one rank, whose `topk_idx` counts this rank's experts. How many rows there are may be known to the
    device alone: nothing here waits for it, so that the call fits into a CUDA graph. Three layouts:

    - **rows with ids**: each row of `buffer.topk_idx` names experts of this rank, -1 for others. `num_rows` says how
      many rows there are. DeepEP's and NCCL-EP's, and vLLM's standard one.
    - **one expert after the other**: `expert_rows` says how many rows each has, and each one's first row is at a
      multiple of `align`. DeepEP's expanded one.
    - **a place for each expert**: as before, with `rows_apart` rows from each expert's first to the next one's.
      DeepEP's low-latency one, and vLLM's batched one.

    In the last two, `buffer` has one slot (`num_topk` = 1) whose ids are written here, and `buffer.topk_weights` is for
    the caller, 1.0 where rows are weighted later.

    Args:
        y: bf16 ``[rows, hidden]``, written: all rows that there may be. Those past the count get zeros.
        l1: as `fp8_mega_moe` takes them, of this rank's experts.
        l2: likewise.
        buffer: of ``get_symm_buffer_for_mega_moe(None, local experts, ...)``, without shared experts, with the rows.
        num_rows: int32, uint32 or int64 ``[1]`` on the device, 0 to `rows`; what lies in the buffer past it does not
            matter.
        expert_rows: int32, uint32 or int64 ``[local experts]`` on the device.
        rows_apart: see above.
        align: see above.
        activation_clamp, fast_math, num_sms, variant: as `fp8_mega_moe` takes them.

    Raises:
        MegaMoeError: as `fp8_mega_moe`.
    """
    require_buffer(buffer)
    require_tensor("y", y)
    if y.ndim != 2:
        raise ConfigError(f"y has shape {tuple(y.shape)}; allowed: [rows, {buffer.hidden}]")
    if buffer.ranks > 1 or buffer.num_shared_experts:
        ranks, shared = counted(buffer.ranks, "rank"), counted(buffer.num_shared_experts, "shared expert")
        allowed = "one of one rank, without shared experts"
        raise ConfigError(f"a buffer of {ranks} with {shared}; allowed: {allowed}")
    rows = y.shape[0]
    check(rows <= buffer.num_max_tokens_per_rank, "rows of y", rows, f"at most {buffer.num_max_tokens_per_rank}")
    if (num_rows is None) == (expert_rows is None):
        raise ConfigError("both or none of num_rows and expert_rows given; allowed: one of them")
    buffer.require_usable()
    with buffer.lock:
        buffer.wait_for_last()  # it may still read the ids
        ids = buffer.topk_idx[:rows]
        if num_rows is not None:
            check_count("num_rows", num_rows, 1, buffer.device)
            mask_rows(ids, num_rows)
        elif expert_rows is not None:
            check_count("expert_rows", expert_rows, buffer.num_experts, buffer.device)
            check(buffer.num_topk == 1, "num_topk", buffer.num_topk, "1, where rows are grouped by expert")
            _write_ids(ids, expert_rows, rows_apart, align)
        options = {"activation_clamp": activation_clamp, "fast_math": fast_math}
        fp8_mega_moe(y, l1, l2, buffer, num_sms=num_sms, variant=variant, **options)  # type: ignore[arg-type]


def check_count(name: str, count: torch.Tensor, numbers: int, device: torch.device) -> None:
    """Raise `ConfigError` unless these are so many whole numbers on the device."""
    require_tensor(name, count)
    if count.dtype not in _COUNTS:
        raise ConfigError(f"{name} has dtype {count.dtype}; allowed: int32, uint32 or int64")
    check_tensor(name, count, count.dtype, (numbers,), device, align=count.itemsize)


def _check_rows(name: str, rows: int) -> None:
    check(type(rows) is int and 0 < rows <= _MOST_ROWS, name, rows, f"1 to {_MOST_ROWS} rows")


def _write_ids(topk_idx: torch.Tensor, expert_rows: torch.Tensor, rows_apart: int | None, align: int) -> None:
    """The expert of each row, of rows that lie by expert; -1 for what lies between."""
    counts = expert_rows.to(torch.int64)
    row = torch.arange(topk_idx.shape[0], dtype=torch.int64, device=topk_idx.device)
    if rows_apart is None:
        _check_rows("align", align)
        ends = (torch.div(counts + (align - 1), align, rounding_mode="floor") * align).cumsum(0)
        expert = torch.searchsorted(ends, row, right=True)
        known = expert.clamp(max=len(counts) - 1)
        first = torch.cat((ends.new_zeros(1), ends[:-1]))[known]
        real = (expert < len(counts)) & (row - first < counts[known])
    else:
        _check_rows("rows_apart", rows_apart)
        expert = torch.div(row, rows_apart, rounding_mode="floor")
        known = expert.clamp(max=len(counts) - 1)
        real = (expert < len(counts)) & (row % rows_apart < counts[known])
    topk_idx.copy_(torch.where(real, known, -1)[:, None])
