"""From a shape and a token count to the kernel variant and its run-time parameters, with the reasons.

First that is there wins: the caller's variant; the caller's threshold; this GPU's measured rules for the shape, from
the least token count that was measured on; the default threshold.  Another rule belongs in `_pick`, as a function
that gives variant and reason.  Of weights that no table was measured with, `_reading` decides: of packed ones by the
rows that an expert has, of others by the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import FP8, MAX_EXPERTS, MAX_TOKENS, MoEShape, Variant, WeightFormat, check_int
from megamoe_jit._spec.formats import ExpandedParts
from megamoe_jit._spec.variants import AUTO
from megamoe_jit._text import counted, human_bytes, shown
from megamoe_jit.heuristics.tables import Rule, Table, table_for, tables

COOPERATIVE_THRESHOLD = 256  #: tokens per rank from which the cooperative kernel is taken where nothing was measured
#: Rows per expert up to which packed weights are best multiplied by a variant, on an H200, in the order of trying: with
#: operands swapped; in larger tiles, as many experts would need two of the others; unpacked beside the products; and
#: expanded in memory first.
PACKED_ROWS = {Variant.DECODE: 50, Variant.WIDE: 76, Variant.UNPACK: 576, Variant.PREFILL: math.inf}
EXPAND_EVERY = 3  #: of so many blocks one expands weights first, while the others begin
FEW_ROWS = 8192  #: token-slots below which rows are handed out one by one
MOST_SMS = 1024  #: of a launch; no GPU has as many
LAG = 2.0  #: tiles of the first GEMM for each block, where no table says more


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a call."""

    variant: Variant
    reasons: tuple[str, ...]
    lag_tiles: int  #: tiles of the first GEMM that are handed out before the first tile of the second
    rows_per_item: int  #: rows that one item of dispatch covers
    expand_every: int = 0  #: of so many blocks one expands packed weights first; 0 where nobody does


def _by_threshold(tokens: int, threshold: int) -> tuple[Variant, str]:
    if tokens < threshold:
        picked, sign = Variant.PINGPONG, "<"
        why = f"tiles of {picked.block_m} rows waste less"
    else:
        picked, sign = Variant.COOPERATIVE, ">="
        why = f"one weight load serves {picked.block_m} rows"
    return picked, f"{counted(tokens, 'token')} per rank {sign} {shown(threshold)}, {why}"


def _by_measurement(table: Table, shape: MoEShape, rule: Rule) -> tuple[Variant, str]:
    place = f"{table.where(shape, rule)}, measured on {table.devices[0]} ({table.date[:10]})"
    return rule.variant, f"within 1 % of the best {place}"


def _unmeasured(table: Table, shape: MoEShape, ranks: int) -> str:
    """Why a table has no rule for one rank's shape, and which share of the same layer was measured, if one was."""
    gpu = table.devices[0]
    if shape in table.rules:
        return f"nobody measured so few tokens of this shape on {gpu}"
    shares = sorted(
        (known.experts for known in table.rules if replace(known, experts=shape.experts) == shape), reverse=True
    )
    fitting = [share for share in shares if shape.experts * ranks % share == 0]
    if not fitting:
        return f"nobody measured this shape on {gpu}"
    needed = shape.experts * ranks // fitting[0]
    return (
        f"nobody measured {shape.experts} experts of this shape on one {gpu}, but {fitting[0]}, "
        f"which is one rank of {needed} (--ranks {needed})"
    )


def _pick(
    shape: MoEShape, tokens: int, threshold: int | None, table: Table | None, rule: Rule | None, ranks: int
) -> tuple[Variant, str]:
    """What `auto` takes, and why; `shape` has the experts of one rank."""
    if threshold is not None:
        return _by_threshold(tokens, threshold)
    if table is not None and rule is not None:
        return _by_measurement(table, shape, rule)
    variant, why = _by_threshold(tokens, COOPERATIVE_THRESHOLD)
    return variant, why if table is None else f"{_unmeasured(table, shape, ranks)}; {why}"


def _reading(weights: WeightFormat, tokens: int, load: float, threshold: int | None) -> tuple[Variant, str]:
    """What `auto` takes for weights of another format than the tables were measured with; `load` is rows per expert."""
    readers = sorted(Variant.reading(weights), key=lambda variant: variant.block_m)
    if not readers:
        raise ConfigError(f"no variant multiplies weights in {weights.name} yet; allowed: {FP8.name}")
    if len(readers) == 1:
        return readers[0], f"the one that multiplies weights in {weights.name}"
    if weights.bits < 8:
        return _packed(weights, tokens, load, threshold)
    limit = COOPERATIVE_THRESHOLD if threshold is None else threshold
    few = tokens < limit
    why = f"{counted(tokens, 'token')} per rank {'<' if few else '>='} {limit}, weights in {weights.name}"
    return readers[0 if few else -1], why


def _packed(weights: WeightFormat, tokens: int, load: float, threshold: int | None) -> tuple[Variant, str]:
    """Of weights that are expanded on their way: the more rows share one, the further from the product."""
    readers = [(variant, most) for variant, most in PACKED_ROWS.items() if variant in Variant.reading(weights)]
    if threshold is not None:
        (fewest, _), *readers = readers
        if tokens < threshold:
            return fewest, f"{counted(tokens, 'token')} per rank < {threshold}, weights in {weights.name}"
    place = next(i for i, (_, most) in enumerate(readers) if load <= most)
    picked, most = readers[place]
    limit = f"<= {most}" if most < math.inf else f"> {readers[place - 1][1] if place else 0}"
    return picked, f"{load:.1f} rows per expert {limit}, weights in {weights.name}"


def choose(
    shape: MoEShape,
    tokens: int,
    *,
    ranks: int = 1,
    variant: str = AUTO,
    cooperative_threshold: int | None = None,
    num_sms: int = 132,
    gpu: str | None = None,
    weights: WeightFormat = FP8,
) -> Choice:
    """Pick the kernel for one call.

    Args:
        shape: Sizes of the layer.
        tokens: Tokens of this rank, 0 included.
        ranks: Ranks that share the experts.
        variant: ``auto``, or the name of the variant to force.
        cooperative_threshold: Tokens per rank from which ``auto`` takes the cooperative kernel, or of packed weights
            another than decode, whatever was measured; None for what was measured on `gpu`, else 256.
        num_sms: Blocks of the launch.
        gpu: Name of the GPU, as CUDA gives it, for what was measured on it; None for none.
        weights: How the weights are stored; the tables are of FP8.

    Raises:
        ConfigError: The token count or the variant is not supported.
    """
    if not isinstance(shape, MoEShape):
        raise ConfigError(f"shape = {shown(shape)} is not supported; allowed: a MoEShape")
    if not isinstance(gpu, str | None):
        raise ConfigError(f"gpu = {shown(gpu)} is not supported; allowed: the name of a GPU, or None")
    for name, number in (("tokens", tokens), ("ranks", ranks), ("num_sms", num_sms)):
        check_int(name, number)
    if cooperative_threshold is not None:
        check_int("cooperative_threshold", cooperative_threshold)
    if not 0 <= tokens <= MAX_TOKENS:
        raise ConfigError(f"tokens = {shown(tokens)} is not supported; allowed: 0 to {MAX_TOKENS}")
    if not 1 <= ranks <= MAX_EXPERTS:
        raise ConfigError(f"ranks = {shown(ranks)} is not supported; allowed: 1 to {MAX_EXPERTS}")
    if not 1 <= num_sms <= MOST_SMS:
        raise ConfigError(f"num_sms = {shown(num_sms)} is not supported; allowed: 1 to {MOST_SMS}")
    table = table_for(gpu) if weights is FP8 else None
    own = shape if table is None else replace(shape.routed, experts=max(1, shape.experts // ranks))
    rule = None if table is None else table.rule(own, tokens)
    load = tokens * shape.topk * ranks / shape.experts
    if not isinstance(variant, str) or variant != AUTO:
        picked, reason = Variant.parse(variant), "asked for, by the call or by MEGAMOE_JIT_VARIANT"
    elif weights is not FP8:
        picked, reason = _reading(weights, tokens, load, cooperative_threshold)
    else:
        picked, reason = _pick(own, tokens, cooperative_threshold, table, rule, ranks)
    rows = tokens * shape.slots
    about = format(load, ".1f" if load >= 1 else ".1g")
    alike = f" if the {ranks} ranks are alike" if ranks > 1 else ""
    reasons = [
        f"{picked.value}: {reason}",
        f"about {about} rows per expert in tiles of up to {picked.block_m}{alike}",
    ]
    if rule is not None and rule.variant is picked:
        lag_tiles, rows_per_item = max(1, round(rule.lag * num_sms)), rule.rows_per_item
        reasons.append(f"lag_tiles {lag_tiles}, rows_per_item {rows_per_item}: measured with it")
        return Choice(picked, tuple(reasons), lag_tiles, rows_per_item)
    lag_tiles = max(1, round(LAG * num_sms))
    reasons.append(f"lag_tiles {lag_tiles}: {LAG:g} tiles of the first GEMM for each of {num_sms} blocks")
    rows_per_item = 1 if rows < FEW_ROWS else 8
    sign = "<" if rows < FEW_ROWS else ">="
    reasons.append(f"rows_per_item {rows_per_item}: {rows} token-slots {sign} {FEW_ROWS}")
    every = EXPAND_EVERY if picked.expands else 0
    if every:
        room = sum(ExpandedParts.of(shape.hidden, shape.intermediate, shape.experts_of(ranks) // ranks))
        reasons.append(f"expand_every {every}: {num_sms // every} of {num_sms} blocks expand weights first")
        reasons.append(f"they are expanded to {human_bytes(room)} of memory, which the layers of a buffer share")
    return Choice(picked, tuple(reasons), lag_tiles, rows_per_item, every)


def all_variants(
    shape: MoEShape, weights: WeightFormat = FP8, *, ranks: int = 1, most: int = MAX_TOKENS
) -> tuple[Variant, ...]:
    """Every variant that some token count of `shape` can pick, whatever GPU and threshold: what a warmup compiles.

    Args:
        shape: Sizes of the layer.
        weights: How the weights are stored.
        ranks: Ranks that share the experts; of packed weights alone.
        most: Tokens of a rank, at most; of packed weights alone.
    """
    if weights is not FP8:
        # close enough to each other for the narrowest range of rows that has a variant of its own
        counts = (0, most, *(n << i for i in range(most.bit_length()) for n in (1, 3) if n << i <= most))
        picked = {
            choose(shape, tokens, weights=weights, ranks=ranks, cooperative_threshold=threshold).variant
            for tokens in counts
            for threshold in (None, 0)  # the other end of what a setting may say
        }
        return tuple(variant for variant in Variant if variant in picked)
    wanted = {choose(shape, 0).variant, choose(shape, MAX_TOKENS).variant}
    for table in tables():
        wanted.update(rule.variant for rules in table.rules.values() for rule in rules)
    return tuple(variant for variant in Variant if variant in wanted)
