"""Experts on two ranks by transformers' own hooks: each has half of them, ids of the others' are masked."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from megamoe_jit._check.spawn import describe, run_ranks
from tests.ranks import forked


def test_two_ranks_have_the_logits_of_one():
    with forked():
        ends = run_ranks("tests.unit.transformers.ep_ranks:on_rank", 2, device="cpu", timeout_s=120)
    assert all(end.ok for end in ends), describe(ends)
    for experts, diff in (end.result for end in ends):
        assert experts == 2
        assert diff < 1e-6
