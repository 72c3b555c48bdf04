"""The calls over several nodes: the buffer of a layer, and `fp8_mega_moe_multinode`."""

from __future__ import annotations

from typing import Any

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._device.layout import DEFAULT_POOL_ROWS
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer.calls import place_of
from megamoe_jit._layer.checks import check_tensor
from megamoe_jit._layer.given_weights import WeightTensors, format_of_call
from megamoe_jit._layer.group import collectively, require_equal
from megamoe_jit._layer.quantize import require_tensor
from megamoe_jit._nodes.along_rails import ExactExchange, GatherExchange
from megamoe_jit._nodes.buffer import MultiNodeBuffer
from megamoe_jit._nodes.choice import Choices, Rule
from megamoe_jit._nodes.exchange import Exchange
from megamoe_jit._nodes.experts import CallOptions
from megamoe_jit._nodes.model import CTAS_ALONE, CTAS_BESIDE, NETWORK, ONE_HOST
from megamoe_jit._nodes.ranks import NodeRanks
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec import MAX_TOKENS, MoEShape, check_int
from megamoe_jit._spec.checks import check, check_float32

PARTIALS = {"bf16": torch.bfloat16, "fp32": torch.float32}
BY_NAME = ("auto", "gather", "exact")
MOST_CHUNKS, MOST_CTAS = 64, 64
PATIENCE_S, PATIENCE = 60.0, 0.6  #: seconds, and of the deadline of kernels where that is shorter


def get_multinode_buffer_for_mega_moe(
    topology: NodeRanks,
    num_experts: int,
    num_max_tokens_per_rank: int,
    num_topk: int,
    hidden: int,
    intermediate_hidden: int,
    num_shared_experts: int = 0,
    *,
    exchange: str | Exchange = "auto",
    partial: str = "bf16",
    chunks: int | str = 1,
    comm_ctas: int | None = None,
    timeout_s: float | None = None,
    device: torch.device | str | int | None = None,
    max_pool_rows: int = DEFAULT_POOL_ROWS,
) -> MultiNodeBuffer:
    """Allocate the buffer of one rank of several nodes; a collective of all ranks of the topology.

    Args:
        topology: the ranks. Rank r of R holds experts ``r * E / R`` up to ``(r + 1) * E / R``.
        num_experts: experts of all ranks, a multiple of their number.
        num_max_tokens_per_rank: most tokens of a rank in a call.
        num_topk, hidden, intermediate_hidden, max_pool_rows, device: as of `get_symm_buffer_for_mega_moe`.
        num_shared_experts: likewise; 0 where there is more than one node.
        exchange: "gather" brings every row to every node, "exact" only where it has experts, while the host waits for
            the counts; "auto" takes by each call's rows what the model says is faster. Or an `Exchange`.
        partial: "bf16" or "fp32", in which nodes send what they have summed.
        chunks: parts of a call, so that rows of one travel while another is computed; "auto" by the rule, for each call
            by its rows.
        comm_ctas: blocks that NCCL may take; kernels leave it so many SMs while rows travel. By default 8, and 32 where
            there are no chunks and so nothing beside.
        timeout_s: after which a rank that does not come is lost. Shorter than a kernel's own (MEGAMOE_JIT_TIMEOUT_S),
            so that it is the rail that says who is missing; by default 60, or six tenths of that.

    Returns:
        The buffer, all of whose slots are masked.

    Raises:
        ConfigError: a value is not supported, or the memory is not there (says the bytes); on every rank.
        RankMismatchError: the ranks ask for different layers.
        MegaMoeError: as `get_symm_buffer_for_mega_moe`.
    """
    if not isinstance(topology, NodeRanks):
        raise ConfigError(f"topology: {type(topology).__name__} given; allowed: a NodeTopology")
    refuse_capture("a buffer cannot be made", "make it before the capture")
    sizes = (hidden, intermediate_hidden, num_experts, num_topk, num_shared_experts)
    deadline = get_settings().timeout_s
    patience: Any = min(PATIENCE_S, PATIENCE * deadline) if timeout_s is None else timeout_s

    name = exchange if isinstance(exchange, str) else getattr(exchange, "name", type(exchange).__name__)

    def admit() -> tuple[Rule, torch.device, int]:
        shape = MoEShape(*sizes)
        check_int("num_max_tokens_per_rank", num_max_tokens_per_rank)
        check_int("max_pool_rows", max_pool_rows)
        most = MAX_TOKENS * MOST_CHUNKS  # of launches that are as large as can be
        fits = 0 < num_max_tokens_per_rank <= most
        check(fits, "num_max_tokens_per_rank", num_max_tokens_per_rank, f"1 to {most}")
        _check_ways(exchange, partial, chunks, comm_ctas, patience)
        check(patience < deadline, "timeout_s", patience, f"less than a kernel's deadline, {deadline:g} s")
        ranks = topology.world_size
        check(num_experts % ranks == 0, "num_experts", num_experts, f"a multiple of {ranks}, the ranks")
        if num_shared_experts and topology.nodes > 1:
            raise ConfigError(
                f"num_shared_experts = {num_shared_experts} on {topology.nodes} nodes; allowed: 0. Run them apart, or "
                "as routed experts of their own, whose ids and weights with_shared_experts of the reference makes"
            )
        network = ONE_HOST if topology.one_host else NETWORK
        ways = name, PARTIALS[partial].itemsize, network, None if chunks == "auto" else int(chunks)
        rule = Rule(shape, topology.nodes, topology.ranks_per_node, *ways)
        parts = rule.chunks or rule(num_max_tokens_per_rank).chunks
        return rule, place_of(device), min(parts, num_max_tokens_per_rank)

    rule, where, parts = collectively(topology.group, "checking the layer", admit)
    if not isinstance(exchange, str) and not exchange.float32 and partial == "fp32":
        raise ConfigError(f"partial = 'fp32' with exchange {name}; allowed: 'bf16', it carries nothing else back")
    asked = {"sizes": sizes, "tokens": num_max_tokens_per_rank, "exchange": name, "partial": partial, "chunks": parts}
    ctas = comm_ctas if comm_ctas is not None else CTAS_ALONE if parts == 1 else CTAS_BESIDE
    if topology.world_size > 1:
        require_equal(topology.group, "the layer", {**asked, "comm_ctas": ctas, "max_pool_rows": max_pool_rows})
    if isinstance(exchange, str):
        rail = topology.rail(ctas, float(patience))
        both = GatherExchange(rail), ExactExchange(rail)
        choices = Choices([it for it in both if exchange in ("auto", it.name)], rail, rule)
    else:
        choices = Choices([exchange], None, rule)
    more: dict[str, Any] = {"partial": PARTIALS[partial], "chunks": parts, "comm_ctas": ctas}
    more |= {"timeout_s": float(patience), "max_pool_rows": max_pool_rows}
    return MultiNodeBuffer(topology, rule.shape, num_max_tokens_per_rank, where, choices, **more)


def _check_ways(exchange: object, partial: object, chunks: object, comm_ctas: object, timeout_s: Any) -> None:
    named = isinstance(exchange, str) and exchange in BY_NAME
    ways = all(callable(getattr(exchange, name, None)) for name in ("dispatch", "combine", "most_rows"))
    check(
        named or (ways and not isinstance(exchange, str)), "exchange", exchange, "auto, gather, exact, or an Exchange"
    )
    check(isinstance(partial, str) and partial in PARTIALS, "partial", partial, "bf16 or fp32")
    counted = type(chunks) is int and 1 <= chunks <= MOST_CHUNKS
    check(counted or (isinstance(chunks, str) and chunks == "auto"), "chunks", chunks, f"1 to {MOST_CHUNKS}, or auto")
    counted = comm_ctas is None or (type(comm_ctas) is int and 1 <= comm_ctas <= MOST_CTAS)
    check(counted, "comm_ctas", comm_ctas, f"1 to {MOST_CTAS}")
    check(check_float32("timeout_s", timeout_s) > 0, "timeout_s", timeout_s, "seconds, above 0")


def fp8_mega_moe_multinode(
    y: torch.Tensor,
    l1: WeightTensors,
    l2: WeightTensors,
    buffer: MultiNodeBuffer,
    padded_tokens: int | None = None,
    activation_clamp: float | None = None,
    fast_math: bool = True,
    *,
    num_sms: int | None = None,
    variant: str | None = None,
) -> None:
    """Run one MoE layer on the tokens staged in `buffer`, whose experts are on all ranks of all nodes.

    What `fp8_mega_moe` computes, but that what a node gives for a token is rounded to the buffer's `partial` before
    nodes are summed, node 0 first. On one node it is that call.

    Args:
        y: bf16 ``[T, hidden]``, written; T is the number of tokens staged, 0 to `padded_tokens`.
        l1: of this rank's experts, as `fp8_mega_moe` takes them.
        l2: likewise.
        buffer: of `get_multinode_buffer_for_mega_moe`, with the inputs.
        padded_tokens: rows of each rank in this call, **the same on all ranks**; the buffer's capacity by default. What
            is past T is masked by the call.
        activation_clamp: as of `fp8_mega_moe`.
        fast_math: likewise.
        num_sms: likewise.
        variant: likewise.

    Raises:
        ConfigError: an argument is not supported; nothing was sent.
        CaptureError: first use during CUDA-graph capture; `buffer.prepare()` comes before.
        PeerTimeoutError: a rank is lost; says which, and its node.
        MegaMoeError: as `fp8_mega_moe`.

    A collective of all ranks: each makes every call, one without tokens too. The first one prepares the kernels
    together; what is refused on one rank then is refused on all.
    """
    if not isinstance(buffer, MultiNodeBuffer):
        given = type(buffer).__name__
        raise ConfigError(f"buffer: {given} given; allowed: that of get_multinode_buffer_for_mega_moe(...)")

    def admit() -> CallOptions:
        require_tensor("y", y)
        if y.ndim != 2:
            raise ConfigError(f"y has shape {tuple(y.shape)}; allowed: [tokens, {buffer.hidden}]")
        check_tensor("y", y, torch.bfloat16, (y.shape[0], buffer.hidden), buffer.device)
        return CallOptions.checked(activation_clamp, fast_math, variant, num_sms, format_of_call(l1))

    buffer.run(y, l1, l2, padded_tokens, fast_math, admit)
