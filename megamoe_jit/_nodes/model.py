"""What a call over several nodes costs, modelled, and the rule that follows: which exchange, how many chunks.

Nothing here was measured on a network: bytes are exact, times are a model whose figures stand below. It needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import comb

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import BLOCK, FP8, MAX_TOKENS, MoEShape, WeightFormat
from megamoe_jit._text import counted

MOST_CHUNKS = 4
CTAS_ALONE, CTAS_BESIDE = 32, 8  #: blocks of NCCL where nothing runs beside it, and beside kernels
SMS = 132  #: of an H200
WORTH = 0.95  #: of the time of fewest chunks, that more of them have to take less than: they need a second buffer
LOST_ROWS = 64.0  #: of each expert in each chunk: half of the last tile of 128, which kernels compute all the same
WEIGHT_BYTES_PER_US = 4.13e6  #: of an H200's memory, by the kernel
FLOP_PER_US = 1.05e9  #: FP8, by the kernel at large batches
SHARPNESS = 3.6  #: how the two limits meet: as measured at 512 tokens, where both are as long


@dataclass(frozen=True, slots=True)
class Network:
    """What rows travel over."""

    bytes_per_us: float = 45e3  #: that reach a GPU from other nodes; 400 Gb/s for each GPU, of which 90 % are rows
    beside_bytes_per_us: float = 45e3  #: the same beside kernels, where NCCL has few blocks
    gather_us: float = 100.0  #: beside the bytes of a call in the gather form: two collectives, and the sum
    #: Beside those of the exact form, whose launches wait for counts on the host. It is 490 us more than gather where
    #: all else was equal: measured, 512 tokens on two H200 over NVLink.
    exact_us: float = 590.0


NETWORK = Network()
#: NVLink between GPUs of one host that are nodes of their own, by NCCL: measured on two H200
ONE_HOST = Network(bytes_per_us=230e3, beside_bytes_per_us=75e3, gather_us=40.0, exact_us=530.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call, on each rank; times are modelled."""

    exchange: str  #: "gather" or "exact"
    chunks: int  #: that the call is cut into
    sent_bytes: float  #: that a rank sends to other nodes, there and back
    exchange_us: float  #: of that
    kernel_us: float  #: of the node's kernel
    total_us: float  #: of the call
    reasons: tuple[str, ...]  #: why this exchange and so many chunks


def rows_per_token(exchange: str, nodes: int, shape: MoEShape) -> float:
    """Rows that a token's rank sends to other nodes, with uniform routing to different experts."""
    if exchange == "gather":
        return nodes - 1.0
    local = shape.experts // nodes
    nowhere = comb(shape.experts - local, shape.topk) / comb(shape.experts, shape.topk)
    return (nodes - 1) * (1 - nowhere)


def sent_bytes(shape: MoEShape, rows: float, partial_bytes: int) -> float:
    """Bytes of so many rows, there with scales, ids and weights, and back as partial results."""
    return rows * (row_bytes(shape) + shape.hidden * partial_bytes)


def check_launch_rows(rows: int, tokens: int, nodes: int, chunks: int) -> None:
    """Raise `ConfigError` if a launch would have more rows than there can be; `tokens` are of each rank, in a call."""
    if rows > MAX_TOKENS:
        given = f"{tokens} tokens on {counted(nodes, 'node')} in {counted(chunks, 'chunk')} are {rows} rows of a launch"
        raise ConfigError(f"{given}; allowed: at most {MAX_TOKENS} (more chunks have fewer each)")


def row_bytes(shape: MoEShape) -> int:
    """Bytes of a row as it is staged and as it travels: codes, scales, ids and weights."""
    return shape.hidden + shape.hidden // BLOCK * 4 + shape.topk * 12


def _kernel_us(shape: MoEShape, ranks: int, tokens: float, weights: WeightFormat, more_rows: float = 1.0) -> float:
    untouched = (1 - shape.topk / shape.experts) ** (ranks * tokens)
    expert = weights.expert_code_bytes(shape.hidden, shape.intermediate)
    read = expert * shape.experts / ranks * (1 - untouched) / WEIGHT_BYTES_PER_US
    multiplied = 6.0 * shape.hidden * shape.intermediate * tokens * shape.topk * more_rows / FLOP_PER_US
    return float((read**SHARPNESS + multiplied**SHARPNESS) ** (1 / SHARPNESS))


def _launches_us(shape: MoEShape, ranks: int, tokens: int, weights: WeightFormat, chunks: int) -> float:
    """All launches of a call: each reads the weights again and fills its last tiles, and leaves SMs to NCCL."""
    if chunks == 1:
        return _kernel_us(shape, ranks, tokens, weights)
    rows = ranks * tokens * shape.topk / shape.experts  # of an expert
    more = (rows + chunks * LOST_ROWS) / (rows + LOST_ROWS)
    return chunks * _kernel_us(shape, ranks, tokens / chunks, weights, more) * SMS / (SMS - CTAS_BESIDE)


def cost(
    shape: MoEShape,
    nodes: int,
    ranks_per_node: int,
    tokens: int,
    *,
    exchange: str = "auto",
    chunks: int | None = None,
    partial_bytes: int = 2,
    capturing: bool = False,
    network: Network = NETWORK,
    weights: WeightFormat = FP8,
) -> Cost:
    """What a call costs, and what it takes if that is left to the rule.

    Args:
        shape: the layer, with all ranks' experts.
        nodes, ranks_per_node: the ranks.
        tokens: of each rank, padded.
        exchange: "auto" for the rule, or one.
        chunks: as the buffer has them; None for the rule.
        partial_bytes: 2 for bf16, 4 for float32.
        capturing: into a CUDA graph, where nothing can wait for counts.
        network: what rows travel over.
        weights: the format of the weights, which the kernel reads.
    """
    ranks = nodes * ranks_per_node
    launches = functools.partial(_launches_us, shape, ranks, tokens, weights)
    if nodes == 1:
        kernel = launches(1)
        return Cost("none", 1, 0.0, 0.0, kernel, kernel, ("one node: nothing travels between nodes",))
    least = -(-tokens // (MAX_TOKENS // nodes))
    possible = range(least, max(least, min(MOST_CHUNKS, tokens)) + 1) if chunks is None else (chunks,)

    def form(name: str) -> list[Cost]:
        """Calls in this form, the one to take first."""
        sent = sent_bytes(shape, tokens * rows_per_token(name, nodes, shape), partial_bytes)
        calls = [_call(name, parts, sent, launches(parts), network) for parts in possible]
        return sorted(calls, key=lambda it: it.total_us * (WORTH if it is calls[0] else 1.0))

    forms = {name: form(name) for name in ("gather", "exact")}
    best = {name: calls[0].total_us for name, calls in forms.items()}
    exchange, why = _exchange(exchange, capturing, best, nodes, shape)
    found, how = forms[exchange][0], "as asked"
    if chunks is None:
        each = sorted(forms[exchange], key=lambda it: it.chunks)
        how = "modelled " + ", ".join(f"{it.total_us:.0f} us in {it.chunks}" for it in each)
    return replace(found, reasons=(why, f"{counted(found.chunks, 'chunk')}: {how}"))


def _call(exchange: str, chunks: int, sent: float, kernel_us: float, net: Network) -> Cost:
    """One in so many chunks: all but one of them hide what is shorter, rows or launches."""
    fixed = net.gather_us if exchange == "gather" else net.exact_us
    travelling = chunks * fixed + sent / (net.bytes_per_us if chunks == 1 else net.beside_bytes_per_us)
    shorter, longer = sorted((kernel_us, travelling))
    return Cost(exchange, chunks, sent, travelling, kernel_us, longer + shorter / chunks, ())


def _exchange(asked: str, capturing: bool, calls: Mapping[str, float], nodes: int, shape: MoEShape) -> tuple[str, str]:
    """Which form, and why."""
    if asked != "auto":
        return asked, f"{asked}: as asked"
    if capturing:
        return "gather", "gather: in a CUDA graph the host cannot wait for counts"
    exchange = min(calls, key=lambda name: calls[name])
    rows = {name: f"{rows_per_token(name, nodes, shape):.2f}" for name in calls}
    return exchange, (
        f"{exchange}: modelled {calls['gather']:.0f} us by gather ({rows['gather']} rows a token to other nodes) "
        f"and {calls['exact']:.0f} us by exact ({rows['exact']})"
    )
