"""Measured choices: one file per GPU under `tables/`, written by `megamoe-jit tune --write-table`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MoEShape, Variant
from megamoe_jit._text import counted

FOLDER = Path(__file__).with_name("tables")
SCHEMA_VERSION = 1
ROWS_PER_ITEM = (1, 2, 4, 8)  #: what the kernel takes
MAX_LAG = 64


@dataclass(frozen=True, slots=True)
class Rule:
    """What runs from a number of tokens on."""

    tokens: int
    variant: Variant
    lag: float  #: in blocks of the launch
    rows_per_item: int


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on one kind of GPU."""

    devices: tuple[str, ...]  #: names of the GPU, as CUDA gives them
    date: str
    rules: Mapping[MoEShape, tuple[Rule, ...]]  #: by the shape of one rank, ascending by tokens

    def rule(self, shape: MoEShape, tokens: int) -> Rule | None:
        """The rule for one rank's shape and tokens; None if nobody measured the shape, or none with so few tokens."""
        return next((rule for rule in reversed(self.rules.get(shape, ())) if rule.tokens <= tokens), None)

    def where(self, shape: MoEShape, rule: Rule) -> str:
        """At which token counts this rule of the shape was measured best, in words."""
        rules = self.rules[shape]
        after = next((later for later in rules if later.tokens > rule.tokens), None)
        if after is None:
            return f"from {counted(rule.tokens, 'token')} per rank on" if rule.tokens else "at every token count"
        first = f"from {rule.tokens} " if rule.tokens else ""
        return f"{first}up to {counted(after.tokens - 1, 'token')} per rank"


def check_choices(lags: Iterable[float], rows_per_item: Iterable[int]) -> None:
    """Raise `ConfigError` unless the kernel takes each of these."""
    for lag in lags:
        if not 0 < lag <= MAX_LAG:
            raise ConfigError(f"lags: {lag:g} is not supported; allowed: above 0, up to {MAX_LAG}")
    for rows in rows_per_item:
        if rows not in ROWS_PER_ITEM:
            raise ConfigError(f"rows: {rows} is not supported; allowed: {', '.join(map(str, ROWS_PER_ITEM))}")


def _rules(data: list[dict[str, Any]]) -> tuple[Rule, ...]:
    rules = tuple(Rule(d["tokens"], Variant.parse(d["variant"]), float(d["lag"]), d["rows_per_item"]) for d in data)
    if not rules or rules[0].tokens < 0:
        raise ConfigError("a shape has at least one rule, from 0 or more tokens on")
    if any(after.tokens <= before.tokens for before, after in zip(rules, rules[1:], strict=False)):
        raise ConfigError("the rules of a shape ascend by tokens")
    for rule in rules:
        if not 0 < rule.lag <= MAX_LAG or rule.rows_per_item not in ROWS_PER_ITEM:
            allowed = f"a lag above 0 to {MAX_LAG}, rows_per_item of {ROWS_PER_ITEM}"
            raise ConfigError(f"{rule} is not supported; allowed: {allowed}")
    return rules


def parse_table(data: Mapping[str, Any]) -> Table:
    """A table from the content of its file; raises `ConfigError` if it is not in order."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"a table of heuristics is an object, not {type(data).__name__}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"schema_version = {data.get('schema_version')!r}; allowed: {SCHEMA_VERSION}")
    try:
        rules = {
            MoEShape(*(entry[size] for size in ("hidden", "intermediate", "experts", "topk"))): _rules(entry["rules"])
            for entry in data["shapes"]
        }
        return Table(tuple(data["devices"]), data["measured"]["date"], rules)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"a table of heuristics is not in order: {error!r}") from error


@cache
def tables(folder: Path = FOLDER) -> tuple[Table, ...]:
    """All tables; raises `ConfigError` naming the file that is not in order."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(parse_table(json.loads(path.read_text(encoding="utf-8"))))
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path.name}: {error}") from error
    return tuple(found)


def table_for(gpu: str | None) -> Table | None:
    """The table of a GPU by its full name, such as "NVIDIA H200"."""
    return None if gpu is None else next((table for table in tables() if gpu in table.devices), None)


def short_name(gpu: str) -> str:
    """What people call a GPU: `h200` for "NVIDIA H200", `h100` for "NVIDIA H100 80GB HBM3"."""
    words = re.sub(r"\bnvidia\b|\b\d+gb\b|\bhbm\w*", " ", gpu.lower()).split()
    return "-".join(words)


def find_gpu(name: str) -> str:
    """The full name of a GPU that was measured, from that name or the short one, in letters of any case.

    Raises:
        ConfigError: there is no table of this GPU; names those that there are.
    """
    known = [device for table in tables() for device in table.devices]
    for form in (str.lower, short_name):
        found = next((device for device in known if form(device) == form(name)), None)
        if found is not None:
            return found
    allowed = ", ".join([*dict.fromkeys(map(short_name, known)), "none"])
    raise ConfigError(f"nothing was measured on a GPU named {name!r}; allowed: {allowed}")
