"""What a call over several nodes costs, modelled, and the rule that follows: which exchange, how many chunks.

Nothing here was measured on a network: bytes are exact, times are a model whose figures stand below. It needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from megamoe_jit._spec import BLOCK, FP8, MoEShape, WeightFormat

__all__ = ["Cost", "Network", "chunks_for", "cost", "rows_per_expert", "rows_per_token", "sent_bytes"]

ROWS_PER_CHUNK = 250  #: of each expert, from which a chunk keeps the kernel as busy as a whole call does
MOST_CHUNKS = 4
WEIGHT_BYTES_PER_US = 4.13e6  #: of an H200's memory, by the kernel
FLOP_PER_US = 1.05e9  #: FP8, by the kernel at large batches
SHARPNESS = 3.6  #: how the two limits meet: as measured at 512 tokens, where both are as long


@dataclass(frozen=True, slots=True)
class Network:
    """What rows travel over.

    Attributes:
        bytes_per_us: that reach a GPU from other nodes; 400 Gb/s for each GPU, of which 90 % are rows.
        gather_us: beside the bytes of a call in the gather form: two collectives, and the sum.
        exact_us: beside those of the exact form, whose launches wait for counts on the host. It is 490 us more than
            gather where all else was equal: measured, 512 tokens on two H200 over NVLink.
    """

    bytes_per_us: float = 45e3
    gather_us: float = 100.0
    exact_us: float = 590.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call, on each rank.

    Attributes:
        exchange: "gather" or "exact".
        chunks: that the call is cut into.
        sent_bytes: that a rank sends to other nodes, there and back.
        exchange_us: modelled, of that.
        kernel_us: modelled, of the node's kernel.
        total_us: modelled, of the call.
        reasons: why this exchange and so many chunks.
    """

    exchange: str
    chunks: int
    sent_bytes: float
    exchange_us: float
    kernel_us: float
    total_us: float
    reasons: tuple[str, ...]


def rows_per_token(exchange: str, nodes: int, shape: MoEShape) -> float:
    """Rows that a token's rank sends to other nodes, with uniform routing to different experts."""
    if exchange == "gather":
        return nodes - 1.0
    local = shape.experts // nodes
    nowhere = comb(shape.experts - local, shape.topk) / comb(shape.experts, shape.topk)
    return (nodes - 1) * (1 - nowhere)


def sent_bytes(shape: MoEShape, rows: float, partial_bytes: int = 2) -> float:
    """Bytes of so many rows, there with scales, ids and weights, and back as partial results."""
    there = shape.hidden + shape.hidden // BLOCK * 4 + shape.topk * 12
    return rows * (there + shape.hidden * partial_bytes)


def rows_per_expert(shape: MoEShape, ranks: int, tokens: int) -> float:
    """Rows of an expert in a call where each of so many ranks has so many tokens."""
    return ranks * tokens * shape.topk / shape.experts


def chunks_for(shape: MoEShape, ranks: int, tokens: int) -> int:
    """Chunks of such a call: as many as leave each expert `ROWS_PER_CHUNK` rows, at most `MOST_CHUNKS`."""
    return max(1, min(MOST_CHUNKS, int(rows_per_expert(shape, ranks, tokens) // ROWS_PER_CHUNK)))


def _exchange_us(exchange: str, shape: MoEShape, nodes: int, tokens: int, partial_bytes: int, net: Network) -> float:
    rows = tokens * rows_per_token(exchange, nodes, shape)
    fixed = net.gather_us if exchange == "gather" else net.exact_us
    return fixed + sent_bytes(shape, rows, partial_bytes) / net.bytes_per_us


def _kernel_us(shape: MoEShape, ranks: int, tokens: int, weights: WeightFormat) -> float:
    untouched = (1 - shape.topk / shape.experts) ** (ranks * tokens)
    expert = weights.expert_code_bytes(shape.hidden, shape.intermediate)
    read = expert * shape.experts / ranks * (1 - untouched) / WEIGHT_BYTES_PER_US
    multiplied = 6.0 * shape.hidden * shape.intermediate * tokens * shape.topk / FLOP_PER_US
    return float((read**SHARPNESS + multiplied**SHARPNESS) ** (1 / SHARPNESS))


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
    network: Network | None = None,
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
    net, ranks = network or Network(), nodes * ranks_per_node
    reasons = []
    times = {name: _exchange_us(name, shape, nodes, tokens, partial_bytes, net) for name in ("gather", "exact")}
    if nodes == 1:
        exchange = "none"
        reasons.append("one node: nothing travels between nodes")
    elif exchange != "auto":
        reasons.append(f"{exchange}: as asked")
    elif capturing:
        exchange = "gather"
        reasons.append("gather: in a CUDA graph the host cannot wait for counts")
    else:
        exchange = min(times, key=lambda name: times[name])
        rows = {name: f"{rows_per_token(name, nodes, shape):.2f}" for name in times}
        reasons.append(
            f"{exchange}: modelled {times['gather']:.0f} us for gather ({rows['gather']} rows a token to other nodes) "
            f"and {times['exact']:.0f} us for exact ({rows['exact']})"
        )
    kernel = _kernel_us(shape, ranks, tokens, weights)
    if exchange == "none":
        return Cost(exchange, 1, 0.0, 0.0, kernel, kernel, tuple(reasons))
    each = rows_per_expert(shape, ranks, tokens)
    if chunks is None:
        chunks = chunks_for(shape, ranks, tokens)
        reasons.append(f"{chunks} chunk(s): {each:.0f} rows for each expert, at least {ROWS_PER_CHUNK} for a chunk")
    else:
        reasons.append(f"{chunks} chunk(s): as asked")
    fixed = net.gather_us if exchange == "gather" else net.exact_us
    travelling = times[exchange] - fixed
    sent = sent_bytes(shape, tokens * rows_per_token(exchange, nodes, shape), partial_bytes)
    longer, shorter = max(kernel, travelling), min(kernel, travelling)
    total = fixed + longer + shorter / chunks
    return Cost(exchange, chunks, sent, times[exchange], kernel, total, tuple(reasons))
