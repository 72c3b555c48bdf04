"""Fault records: every wait of the kernels has a sentence, and the record is read as it is written."""

from __future__ import annotations

import pytest

from megamoe_jit._device.fault import LOST, ROLES, WAITS, Fault, decode, fault_error
from megamoe_jit._errors import DeviceFaultError, MegaMoeError, PeerTimeoutError
from megamoe_jit._spec.abi import COUNTER_ROWS, GROUP, WARP, Wait

#: By name: words that the sentence must have, so that no code can change its meaning unnoticed.
SAYS = {
    "head_barrier": "blocks of the launch to reach grid barrier",
    "tile_slot_free": "free the slot of tile",
    "tile_published": "publish tile",
    "stage_free": "free pipeline stage",
    "row_loaded": "copied by dispatch",
    "rows_dispatched": "dispatch to bring",
    "gemm1_done": "the first GEMM to finish",
    "gemm1_tile_stored": "of the first GEMM",
    "peer_signal": "the other ranks",
    "tail_barrier": "blocks of the launch to finish their tiles",
    "weight_stage_free": "helpers) to free pipeline stage",
    "gemm2_tile_stored": "of the second GEMM",
    "pool_read": "the first GEMM to read",
    "gemm2_done": "the second GEMM to finish the rows",
    "weights_expanded": "to be expanded",
}


def test_every_wait_has_its_sentence_and_the_reverse():
    assert set(WAITS) == set(Wait)
    assert [wait.name.lower() for wait in Wait] == list(SAYS)
    assert [name for name, text in SAYS.items() if text not in WAITS[Wait[name.upper()]]] == []


@pytest.mark.parametrize("code", sorted(WAITS))
def test_sentences_are_filled_in(code):
    text = str(Fault(code, 2, 17, 5, 64, 3))
    assert text.startswith(f"block 17, {'head' if code == Wait.HEAD_BARRIER else 'dispatch warp'}, waited in vain for ")
    assert "{" not in text
    assert "unknown" not in text
    assert ("rows from 320 on" if "{row}" in WAITS[code] else "5") in text.removeprefix("block 17")


def test_missing_ranks_are_named():
    text = str(Fault(Wait.PEER_SIGNAL, 0, 0, 1, 7, 0b1000_0110))
    assert text.endswith("the other ranks to have their results ready in launch 7 (missing: rank 1, rank 2, rank 7)")


def test_before_the_warps_have_roles_it_is_the_head():
    """Thread 0 takes the barriers of the head, and warp 0 is the activations warp only later."""
    assert str(Fault(Wait.HEAD_BARRIER, 0, 3, 1, 132, 131)).startswith(
        "block 3, head, waited in vain for all 132 blocks"
    )
    assert str(Fault(Wait.PEER_SIGNAL, 0, 3, 0, 4, 2)).startswith("block 3, head, waited in vain for the other ranks")
    assert str(Fault(Wait.PEER_SIGNAL, 3, 3, 1, 4, 2)).startswith("block 3, publisher warp, waited")


def test_a_counter_is_told_as_the_rows_it_counts():
    """64 rows share one, whatever a block of rows is elsewhere."""
    assert "dispatch to bring the rows from 4864 on (3 of 64 arrived)" in str(Fault(6, 0, 0, 76, 64, 3))
    assert COUNTER_ROWS == 64


def test_an_unknown_code_is_said_to_be_one():
    assert str(Fault(77, 0, 0, 1, 2, 3)).endswith("something unknown (code 77)")


def test_roles():
    assert len(ROLES) == GROUP // WARP
    assert "block 1, activations warp," in str(Fault(7, 0, 1, 0, 0, 0))
    assert "block 1, publisher warp," in str(Fault(8, 3, 1, 0, 0, 0))
    assert "block 1, math warp 0," in str(Fault(8, 4, 1, 0, 0, 0))
    assert "block 1, math warp 7," in str(Fault(8, 11, 1, 0, 0, 0))


def test_record_is_read_as_it_is_written():
    assert decode([0, 5, 6, 7]) is None
    who = 6 | 3 << 8 | 131 << 16
    assert decode([who, 12, 64, 40]) == Fault(what=6, warp=3, block=131, which=12, expected=64, seen=40)
    assert decode([who, 12, 64, 40, 99, 99]) == decode([who, 12, 64, 40])


def test_every_field_of_the_record_has_its_whole_width():
    """Eight bits of what and of warp, sixteen of block: `comm/fault.cuh`."""
    assert decode([0x1234_A6F5, 1, 2, 3]) == Fault(what=0xF5, warp=0xA6, block=0x1234, which=1, expected=2, seen=3)


def test_words_may_come_as_signed_integers():
    assert decode([1 | 0x9000 << 16, 0xFFFFFFFF, 2, 3]) == decode([(1 | 0x9000 << 16) - 2**32, -1, 2, 3])
    assert decode([(1 | 0x9000 << 16) - 2**32, -1, 2, 3]) == Fault(1, 0, 0x9000, 0xFFFFFFFF, 2, 3)


@pytest.mark.parametrize(
    ("what", "kind"),
    [(code, PeerTimeoutError if code == Wait.PEER_SIGNAL else DeviceFaultError) for code in sorted(WAITS)],
)
def test_error_says_who_waited_for_what_and_what_to_do(what, kind):
    fault = Fault(what, 0, 3, 4, 8, 5)
    error = fault_error(fault, 2, "unspecified launch failure")
    assert type(error) is kind
    assert isinstance(error, MegaMoeError)
    assert str(error).startswith(f"rank 2: {fault}")
    assert "restart the process" in str(error)
    assert "MEGAMOE_JIT_TIMEOUT_S" in str(error)


def test_error_says_when_the_driver_has_not_noticed():
    fault = Fault(4, 0, 3, 4, 8, 5)
    texts = [str(fault_error(fault, 0, cause)) for cause in (None, "unspecified launch failure", LOST)]
    assert ["SIGKILL" in text for text in texts] == [False, False, True]
    assert texts[2].startswith(texts[0])


def test_error_without_a_record_repeats_the_driver():
    error = fault_error(None, 0, "an illegal memory access was encountered")
    assert type(error) is DeviceFaultError
    assert "no MoE kernel left a fault record" in str(error)
    assert str(error).endswith("an illegal memory access was encountered")
