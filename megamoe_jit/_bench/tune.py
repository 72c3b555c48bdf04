"""Measure the run-time choices of a call on this GPU: variant, lag, rows per item; what heuristics/tables is made of.

One cell is one shape (a GPU's slice of a model's experts) and one token count.  All its contenders are checked against
the FP32 reference and then take turns, by the burst protocol of the benchmark.  Each finished cell is one line of a
JSON-lines file; a later run skips the cells that the file already has for this GPU and these kernel sources.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megamoe_jit._bench.clock import FLUSH_BYTES, TimedCall, burst
from megamoe_jit._bench.conditions import environment
from megamoe_jit._bench.measure import Layer, cases, require_hopper, some_rows
from megamoe_jit._check.scenarios import Scenario, make_inputs
from megamoe_jit._compile.render import render
from megamoe_jit._errors import ConfigError
from megamoe_jit._files import read_plain
from megamoe_jit._spec import FP8, KernelSpec, MoEShape, Variant
from megamoe_jit.heuristics.presets import Preset
from megamoe_jit.heuristics.tables import check_choices

SCHEMA_VERSION = 1  #: of a line
DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
DEFAULT_LAGS = (1.0, 2.0, 4.0)
DEFAULT_ROWS = (1, 4, 8)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a call."""

    variant: Variant
    lag: float  #: tiles of the first GEMM per block
    rows_per_item: int

    @property
    def name(self) -> str:
        """For people and as a key."""
        return f"{self.variant.value} lag {self.lag:g} rows {self.rows_per_item}"


def sources(shape: MoEShape) -> str:
    """A digest of the CUDA sources of all variants of a shape: measurements of other sources are not taken over."""
    texts = "".join(render(KernelSpec(shape, variant)).text for variant in Variant.reading(FP8))
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


_MOST_BYTES = 256 << 20  #: of a file of measurements; a cell takes some kilobytes
_BEGIN = '{"schema_version": '  #: of a line; a last one that begins otherwise is no interrupted measurement
_CELL = {"environment", "sources", "name", "shape", "tokens", "num_sms", "times"}


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a file; none if it is not there.

    Raises:
        ConfigError: a line is not what `tune` writes; the last one may be cut short by an interruption.
    """
    if not path.exists():
        return []
    try:
        text = read_plain(path, _MOST_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"measurements cannot be read from {path}: {error.strerror}") from error
    lines = text.splitlines()
    cells = []
    for number, line in enumerate(lines, 1):
        try:
            cell = json.loads(line)
            good = cell["kind"] == "tuning" and cell["schema_version"] == SCHEMA_VERSION and set(cell) >= _CELL
        except (ValueError, KeyError, TypeError):
            if (
                number == len(lines)
                and not text.endswith("\n")
                and (line.startswith(_BEGIN) or _BEGIN.startswith(line))
            ):
                break
            good = False
        if not good:
            raise ConfigError(f"{path}, line {number} is no measurement of schema_version {SCHEMA_VERSION}")
        cells.append(cell)
    return cells


def _identity(cell: dict[str, Any]) -> tuple[Any, ...]:
    return (cell["environment"]["device"], cell["sources"], *cell["shape"].values(), cell["tokens"])


def _call(layer: Layer, case: Scenario, contender: Contender, y: torch.Tensor) -> Callable[[], object]:
    """The launch of a call with these parameters instead of the chosen ones."""
    planned = layer.buffer.plan(case.tokens, contender.variant.value, case.numerics, None)
    lag_tiles = max(1, round(contender.lag * planned.num_sms))
    choice = replace(planned.choice, lag_tiles=lag_tiles, rows_per_item=contender.rows_per_item)
    plan = replace(planned, choice=choice)
    return lambda: layer.launch(plan, y, case)


def _measure(
    layer: Layer, case: Scenario, contenders: Sequence[Contender], flush: torch.Tensor
) -> list[dict[str, Any]]:
    inputs = make_inputs(case, layer.device, weights=layer.weights)
    y = torch.empty(case.tokens, case.shape.hidden, dtype=torch.bfloat16, device=layer.device)
    where, expected = some_rows(case, inputs, layer.weights)
    calls = {c.name: TimedCall(_call(layer, case, c, y), lambda: inputs.stage(layer.buffer)) for c in contenders}
    verdicts = {name: layer.check(call, y, where, expected) for name, call in calls.items()}
    times = burst(calls, flush)
    return [
        {
            "variant": c.variant.value,
            "lag": c.lag,
            "rows_per_item": c.rows_per_item,
            "median_us": statistics.median(times[c.name]),
            "min_us": min(times[c.name]),
            "max_us": max(times[c.name]),
            "diff": verdicts[c.name].diff if verdicts[c.name].passed else None,
            "correct": verdicts[c.name].passed,
        }
        for c in contenders
    ]


def tune(
    presets: Iterable[Preset],
    path: Path,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    *,
    variants: Sequence[Variant] = Variant.reading(FP8),
    lags: Sequence[float] = DEFAULT_LAGS,
    rows_per_item: Sequence[int] = DEFAULT_ROWS,
    force: bool = False,
    commit: str | None = None,
    progress: Callable[[dict[str, Any], bool], None] = lambda _, __: None,
) -> list[dict[str, Any]]:
    """Measure what is not measured yet on the current CUDA device, and append it to a file.

    Args:
        presets: shapes, each with the experts of one of its ranks.
        path: JSON lines; made if it is not there.  An interrupted run goes on where it was.
        tokens: token counts.
        variants: kernels to compare.
        lags: tiles of the first GEMM per block, before the first tile of the second.
        rows_per_item: rows of one item of dispatch.
        force: measure cells again that the file has; the last measurement counts.
        commit: see `conditions.environment`.
        progress: called with each cell, and whether it was measured now.

    Returns:
        The cells asked for, in order; each has `environment`, `sources`, `shape`, `tokens`, `num_sms` and the `times`
        of its contenders in microseconds.

    Raises:
        ConfigError: the file is not in order, or a parameter is not supported.
        UnsupportedDeviceError: there is no Hopper GPU.
    """
    check_choices(lags, rows_per_item)
    contenders = [Contender(v, float(lag), rows) for v in variants for lag in lags for rows in rows_per_item]
    device = require_hopper()
    conditions = environment(commit)
    known = {_identity(cell): cell for cell in read(path)}
    _end_last_line(path)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    found = []
    for preset in presets:
        work = cases([preset], sorted(tokens))
        shape = work[0].shape
        head = {"schema_version": SCHEMA_VERSION, "kind": "tuning", "environment": conditions, "name": preset.name}
        base = {**head, "sources": sources(shape), "shape": shape.to_json(), "num_sms": conditions["sms"]}
        layer = None
        try:
            for case in work:
                cell = {**base, "tokens": case.tokens}
                old = None if force else known.get(_identity(cell))
                names = {(t["variant"], t["lag"], t["rows_per_item"]) for t in old["times"]} if old else set()
                if old and names >= {(c.variant.value, c.lag, c.rows_per_item) for c in contenders}:
                    cell = old
                else:
                    layer = layer or Layer(shape, max(c.capacity for c in work), device)
                    cell["times"] = _measure(layer, case, contenders, flush)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
                    old = None
                found.append(cell)
                progress(cell, old is None)
        finally:
            if layer is not None:
                layer.close()
        del layer
        torch.cuda.empty_cache()
    return found


def _end_last_line(path: Path) -> None:
    """Drop what an interruption left of a last line, so that the next one begins on its own."""
    if not path.exists():
        return
    data = read_plain(path, _MOST_BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        try:
            json.loads(data[len(whole) :])
            whole = data + b"\n"
        except ValueError:
            pass
        path.write_bytes(whole)
