"""From a shape and a token count to the kernel variant and its run-time parameters, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec import MAX_TOKENS, MoEShape, Variant

__all__ = ["AUTO", "COOPERATIVE_THRESHOLD", "Choice", "all_variants", "choose"]

AUTO = "auto"
COOPERATIVE_THRESHOLD = 256  #: tokens per rank from which the cooperative kernel is taken
FEW_ROWS = 8192  #: token-slots below which rows are handed out one by one


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a call."""

    variant: Variant
    reasons: tuple[str, ...]
    lag_tiles: int  #: tiles of the first GEMM that are handed out before the first tile of the second
    rows_per_item: int  #: token-slots one dispatch or combine item covers


def choose(
    shape: MoEShape,
    tokens: int,
    *,
    ranks: int = 1,
    variant: str = AUTO,
    cooperative_threshold: int = COOPERATIVE_THRESHOLD,
    num_sms: int = 132,
) -> Choice:
    """Pick the kernel for one call.

    Args:
        shape: Sizes of the layer.
        tokens: Tokens of this rank, 0 included.
        ranks: Ranks that share the experts.
        variant: ``auto``, or the name of the variant to force.
        cooperative_threshold: Tokens per rank from which ``auto`` takes the cooperative kernel.
        num_sms: Blocks of the launch.

    Raises:
        ConfigError: The token count or the variant is not supported.
    """
    if not 0 <= tokens <= MAX_TOKENS:
        raise ConfigError(f"tokens = {tokens} is not supported; allowed: 0 to {MAX_TOKENS}")
    if num_sms < 1:
        raise ConfigError(f"num_sms = {num_sms} is not supported; allowed: 1 or more")
    reasons: list[str] = []
    if variant != AUTO:
        picked = Variant.parse(variant)
        reasons.append(f"{picked.value}: forced by the caller")
    elif tokens < cooperative_threshold:
        picked = Variant.PINGPONG
        reasons.append(f"pingpong: {tokens} tokens per rank < {cooperative_threshold}, tiles of 64 rows waste less")
    else:
        picked = Variant.COOPERATIVE
        reasons.append(
            f"cooperative: {tokens} tokens per rank >= {cooperative_threshold}, one weight load serves 128 rows"
        )
    rows = tokens * shape.topk
    load = rows * ranks / shape.experts
    reasons.append(f"about {load:.1f} rows per expert in tiles of {picked.block_m} if the {ranks} rank(s) are alike")
    lag_tiles = 2 * num_sms
    reasons.append(f"lag_tiles {lag_tiles}: two tiles of the first GEMM for each of {num_sms} blocks")
    rows_per_item = 1 if rows < FEW_ROWS else 8
    sign = "<" if rows < FEW_ROWS else ">="
    reasons.append(f"rows_per_item {rows_per_item}: {rows} token-slots {sign} {FEW_ROWS}")
    return Choice(picked, tuple(reasons), lag_tiles, rows_per_item)


def all_variants(shape: MoEShape) -> tuple[Variant, ...]:
    """Every variant that some token count of `shape` can pick: what a warmup compiles."""
    small = choose(shape, 0).variant
    large = choose(shape, MAX_TOKENS).variant
    return tuple(dict.fromkeys((small, large)))
