"""Choosing a kernel: pure, explained, and covering what a call can pick."""

import subprocess
import sys

import pytest

from megamoe_jit._errors import ConfigError
from megamoe_jit._settings.settings import override
from megamoe_jit._spec import FP8, MAX_TOKENS, MXFP4, MoEShape, Variant
from megamoe_jit._text import counted
from megamoe_jit.heuristics import all_variants, choose

SHAPE = MoEShape(4096, 2048, 256, 6)


@pytest.mark.parametrize(
    ("tokens", "variant"),
    [
        (0, Variant.PINGPONG),
        (1, Variant.PINGPONG),
        (255, Variant.PINGPONG),
        (256, Variant.COOPERATIVE),
        (257, Variant.COOPERATIVE),
        (MAX_TOKENS, Variant.COOPERATIVE),
    ],
)
def test_the_boundary_is_256_tokens(tokens, variant):
    choice = choose(SHAPE, tokens)
    assert choice.variant is variant
    assert choice.reasons[0].startswith(f"{variant.value}: {counted(tokens, 'token')} per rank")
    assert "256" in choice.reasons[0]


def test_the_boundary_can_be_moved():
    assert choose(SHAPE, 99, cooperative_threshold=100).variant is Variant.PINGPONG
    assert choose(SHAPE, 100, cooperative_threshold=100).variant is Variant.COOPERATIVE
    assert choose(SHAPE, 0, cooperative_threshold=0).variant is Variant.COOPERATIVE
    assert choose(SHAPE, 255, cooperative_threshold=256) == choose(SHAPE, 255)


@pytest.mark.parametrize("variant", Variant.reading(FP8))
@pytest.mark.parametrize("tokens", [0, 255, 256, 8192])
def test_a_forced_variant_is_honoured(variant, tokens):
    choice = choose(SHAPE, tokens, variant=variant.value)
    assert choice.variant is variant
    assert "asked for, by the call or by MEGAMOE_JIT_VARIANT" in choice.reasons[0]


def test_packed_weights_swap_operands_while_experts_have_few_rows():
    """50 of them, by the average; a threshold in tokens overrules it where there is another variant."""
    for tokens, ranks in ((0, 1), (1, 1), (2133, 1), (266, 8)):
        choice = choose(SHAPE, tokens, ranks=ranks, weights=MXFP4)
        assert choice.variant is Variant.DECODE
        assert choice.reasons[0].startswith("decode: ")
    assert choose(SHAPE, 3072, weights=MXFP4, cooperative_threshold=3073).variant is Variant.DECODE
    assert Variant.DECODE in all_variants(SHAPE, MXFP4)


@pytest.mark.parametrize("cooperative_threshold", [None, 0])
def test_experts_that_have_more_rows_than_a_small_tile_get_larger_ones(cooperative_threshold):
    shape = MoEShape(4096, 2048, 48, 6)
    for tokens in (408, 512, 608):
        assert choose(shape, tokens, weights=MXFP4, cooperative_threshold=cooperative_threshold).variant is Variant.WIDE
    assert choose(shape, 609, weights=MXFP4, cooperative_threshold=cooperative_threshold).variant is Variant.UNPACK


@pytest.mark.parametrize("experts", [5, 7, 48, 61, 384])
@pytest.mark.parametrize("most", [500, 1024, 4096])
def test_all_variants_of_packed_weights_cover_every_token_count(experts, most):
    """However narrow the range is in which one is taken."""
    shape = MoEShape(4096, 2048, experts, 5)
    reachable = {choose(shape, tokens, weights=MXFP4).variant for tokens in range(most + 1)}
    assert reachable <= set(all_variants(shape, MXFP4, most=most))


def test_parameters():
    assert choose(SHAPE, 64).lag_tiles == 264
    assert choose(SHAPE, 64, num_sms=37).lag_tiles == 74
    assert choose(SHAPE, 1365).rows_per_item == 1  # 8190 token-slots
    assert choose(SHAPE, 1366).rows_per_item == 8


def test_reasons_name_every_decision_and_the_load():
    reasons = " | ".join(choose(SHAPE, 1024, ranks=8).reasons)
    for word in ("cooperative", "lag_tiles 264", "rows_per_item 1", "192.0 rows per expert", "8 rank"):
        assert word in reasons


def test_reasons_promise_no_more_rows_of_a_tile_than_there_may_be():
    """An expert with more rows than the largest tile of `wide` has smaller ones."""
    reasons = choose(MoEShape(4096, 2048, 48, 6), 608, weights=MXFP4).reasons
    assert "about 76.0 rows per expert in tiles of up to 80" in reasons


CALLS = [
    {"shape": shape, "tokens": tokens, "ranks": ranks, "gpu": gpu, "num_sms": sms}
    for shape in (SHAPE, MoEShape(2048, 768, 128, 8))
    for tokens in (1, 255, 300, 8192)
    for ranks, gpu, sms in ((1, None, 132), (8, None, 132), (8, "NVIDIA H200", 132), (1, "NVIDIA H200", 78))
]


def test_a_choice_depends_on_nothing_but_its_arguments():
    """Not on the calls before it, nor on settings, which are the caller's to hand over."""
    before = [choose(**call) for call in CALLS]
    with override(variant="cooperative", cooperative_threshold=1):
        after = [choose(**call) for call in reversed(CALLS)][::-1]
    assert before == after
    assert len(set(before)) == len(CALLS), "each argument counts"


def test_all_variants_covers_every_token_count():
    reachable = {choose(SHAPE, tokens).variant for tokens in range(0, 2048, 5)}
    assert set(all_variants(SHAPE)) == reachable >= {Variant.PINGPONG, Variant.COOPERATIVE}


def test_refusals():
    for tokens in (-1, MAX_TOKENS + 1):
        with pytest.raises(ConfigError, match=f"tokens = {tokens} is not supported; allowed: 0 to 32768"):
            choose(SHAPE, tokens)
    with pytest.raises(ConfigError, match="num_sms = 0"):
        choose(SHAPE, 1, num_sms=0)
    with pytest.raises(ConfigError, match="'turbo'; allowed: pingpong, cooperative"):
        choose(SHAPE, 1, variant="turbo")


def test_choosing_does_not_import_torch():
    code = "import sys, megamoe_jit.heuristics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_packed_weights_go_further_from_the_product_the_more_rows_share_them():
    shape = MoEShape(4096, 2048, 32, 6)
    picked = {tokens: choose(shape, tokens, weights=MXFP4).variant for tokens in (1, 256, 512, 3072, 3073, 8192)}
    assert list(picked.values()) == [Variant.DECODE] * 2 + [Variant.UNPACK] * 2 + [Variant.PREFILL] * 2
    forced = (
        choose(shape, 512, weights=MXFP4, cooperative_threshold=256),
        choose(shape, 200, weights=MXFP4, cooperative_threshold=256),
    )
    assert [choice.variant for choice in forced] == [Variant.UNPACK, Variant.DECODE]
    many = choose(shape, 8192, weights=MXFP4)
    assert (many.expand_every, forced[0].expand_every) == (3, 0)
    assert f"{32 * 3 * 4096 * 2048 / 2**20} MiB" in " ".join(many.reasons)


def test_a_buffer_for_few_tokens_prepares_no_variant_that_needs_memory():
    shape = MoEShape(4096, 2048, 32, 6)
    assert all_variants(shape, MXFP4, most=64) == (Variant.DECODE, Variant.WIDE)  # by a setting
    assert all_variants(shape, MXFP4) == (Variant.DECODE, Variant.WIDE, Variant.UNPACK, Variant.PREFILL)
    assert Variant.PREFILL in all_variants(MoEShape(4096, 2048, 256, 6), MXFP4, ranks=8, most=8192)
    assert Variant.UNPACK in all_variants(MoEShape(256, 128, 1024, 1), MXFP4, ranks=8)
