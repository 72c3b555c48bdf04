"""What the JSON documents of `bench` and `tune` say, and the rows that are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from megamoe_jit._documents import Count, Document, Figure, Measured, Says
from megamoe_jit._spec import MoEShape
from megamoe_jit._spec.variants import VARIANT_NAMES

KernelName = Annotated[str, Says(enum=list(VARIANT_NAMES))]
OneOrMore = Annotated[int, Says(minimum=1)]
Several = Annotated[int, Says(minimum=2)]


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one case and variant; times in microseconds.

    Attributes:
        variant: as asked for
        kernel: the variant that ran
        sustained_us: of calls without a pause
        staged_us: median with the copies of the inputs into the buffer
        tflops: of the median
        weights_tb_s: bytes of touched weights over the median time; of several ranks, where they are the most
        baseline: the fastest unfused method with the right answer, if that was timed
        baseline_speedup: how many times faster than it
        weights: the format that they are stored in
        ranks: GPUs that share the experts; `experts` are those of one; times are the largest over ranks
        rank_medians_us: of each rank
        one_rank_us: the same on one GPU with its own experts alone
    """

    shape: str
    hidden: Count
    intermediate: Count
    experts: Count
    topk: Count
    tokens: Count
    variant: str
    kernel: KernelName
    weights: str
    median_us: Figure
    min_us: Figure
    max_us: Figure
    sustained_us: Figure
    staged_us: Figure
    diff: Measured
    worst_row_diff: Measured
    correct: bool
    tflops: Figure
    weights_tb_s: Figure
    baseline: str | None
    baseline_us: float | None
    baseline_speedup: float | None

    ranks: Several | None = None
    rank_medians_us: list[Figure] | None = None
    one_rank_us: Figure | None = None
    vs_one_rank: Figure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRow(Row):
    """What was measured for one case and variant, and what it is held against; times in microseconds.

    Attributes:
        bound: which of the two gives the limit
        limit_share: limit over median: 1 is the limit
        best_known_us: the fastest other kernel; this and what follows from it are null unless the rows were compared
            with other kernels
        must_us: the time to reach; null as best_known_us
        aim_us: the time to aim at; null as best_known_us
        normalised_us: median times the run's anchor over that of the targets: the read anchor where weights bound the
            row, the dense one where FLOPs do; null as best_known_us
    """

    bound: Literal["weights", "flops"] | None
    limit_us: float | None
    vs_limit: float | None
    limit_share: float | None
    best_known_us: float | None
    vs_best_known: float | None
    must_us: float | None
    aim_us: float | None
    normalised_us: float | None
    normalised_vs_best_known: float | None
    normalised_limit_share: float | None


@dataclass(frozen=True, slots=True)
class BaselineRow:
    """One way to do the layer unfused; times are the largest over ranks.

    Attributes:
        graph: replayed as a CUDA graph
        compiled: element-wise steps fused by torch.compile
        bound: of `diff`
        reason: why there is no time
    """

    shape: str
    experts: Count
    tokens: Count
    ranks: OneOrMore
    method: str
    graph: bool
    compiled: bool
    median_us: float | None
    min_us: float | None
    max_us: float | None
    diff: float | None
    bound: float
    correct: bool
    reason: str


@dataclass(frozen=True, slots=True)
class NodesRow:
    """One call over several nodes; times are medians in microseconds, of the slowest rank.

    Attributes:
        shape: by name
        tokens: of each rank
        weights: the format that they are stored in
        nodes: how many
        ranks_per_node: GPUs of each
        exchange: how rows travelled
        partial: what nodes sent back
        chunks: parts of the call
        whole_us: the whole call
        kernel_us: the launch of a node alone; null in chunks
        exchange_us: dispatch and combine without the launch; null in chunks
        rest_us: what the whole takes beside both
        modelled_us: the same call by the model, over a network that this was not
        sent_bytes: by the model, to other nodes, of each rank
        diff: of the output to the reference
        correct: within the bounds of `verify`
        baseline: the fastest unfused method
        baseline_us: its time
        baseline_speedup: how many times as fast the whole call is
    """

    shape: str
    tokens: Count
    weights: str
    nodes: OneOrMore
    ranks_per_node: OneOrMore
    exchange: str
    partial: Annotated[str, Says(enum=["bf16", "fp32"])]
    chunks: OneOrMore
    whole_us: Figure
    kernel_us: float | None
    exchange_us: float | None
    rest_us: float | None
    modelled_us: Figure
    sent_bytes: Count
    diff: Measured
    correct: bool
    baseline: str | None
    baseline_us: float | None
    baseline_speedup: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """How the rows of a variant stand.

    Attributes:
        rows: rows that have a best known time
        faster: geometric mean of best known over time: above 1 is faster
        few_rows: rows below the table that have an aim
    """

    variant: str
    basis: Literal["measured", "normalised"]
    rows: Count
    faster: float | None
    must_met: Count
    aim_rows: Count
    aim_met: Count
    few_rows: Count
    few_met: Count


@dataclass(frozen=True, slots=True)
class Choice:
    """The automatic choice against the best forced variant.

    Attributes:
        close: rows within 3 %
        worst: its time over that of the best variant
    """

    rows: Count
    close: Count
    worst: Figure
    shape: str
    tokens: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench(Document):
    """Times of the layer.

    Attributes:
        anchors: what the card gave: before, between shapes, after
        baselines: the layer unfused, by method
        baselines_not_timed: unfused methods that were left out, and why
        summary: how the rows stand, for each variant, as measured and normalised; empty unless they were compared with
            other kernels
        choice: the automatic choice against the best forced variant; null if not both were timed
        nodes: calls over several nodes; then there are no other rows
    """

    KIND = "bench"

    environment: dict[str, Any]
    anchors: tuple[dict[str, float], ...]
    rows: tuple[JudgedRow, ...]
    baselines: tuple[BaselineRow, ...] | None = None
    baselines_not_timed: dict[str, str] | None = None
    summary: tuple[Summary, ...]
    choice: Choice | None
    nodes: tuple[NodesRow, ...] | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Bench:
        """The document of what was measured, as plain data by field."""
        made = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        parts = {"rows": JudgedRow, "baselines": BaselineRow, "summary": Summary, "nodes": NodesRow}
        for name, part in parts.items():
            if name in made:
                made[name] = tuple(part(**each) for each in made[name])
        return cls(**{**made, "choice": made["choice"] and Choice(**made["choice"])})


@dataclass(frozen=True, slots=True)
class Time:
    """One way to run a call; times in microseconds.

    Attributes:
        lag: tiles of the first GEMM per block, before the first tile of the second
        diff: null if the output is wrong
    """

    variant: KernelName
    lag: Figure
    rows_per_item: Count
    median_us: Figure
    min_us: Figure
    max_us: Figure
    diff: float | None
    correct: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured for one shape and token count.

    Attributes:
        name: of the shape
        sources: digest of the CUDA sources of all variants
    """

    schema_version: Literal[1]
    kind: Literal["tuning"]
    environment: dict[str, Any]
    name: str
    sources: str
    shape: MoEShape
    num_sms: Count
    tokens: Count
    times: tuple[Time, ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Cell:
        """A cell of a file."""
        made = {field.name: data[field.name] for field in fields(cls)}
        times = tuple(Time(**{field.name: time[field.name] for field in fields(Time)}) for time in data["times"])
        return cls(**{**made, "shape": MoEShape(**data["shape"]), "times": times})


@dataclass(frozen=True, slots=True)
class Tune(Document):
    """What was measured to choose variant and parameters of a call.

    Attributes:
        data: the file of JSON lines, one cell each
        measured: cells measured now
        wrong: contenders whose output differs from the reference
        table: the table that was written
    """

    KIND = "tune"

    data: str
    measured: Count
    wrong: Count
    table: str | None
    cells: tuple[Cell, ...]
